"""A tokenizer for models without one: a token is written as its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class NumberTokenizer:
    """What the public code needs of a tokenizer. "17 5" is the tokens 17 and 5; none of them ends a sequence."""

    eos_token_id = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f"{token} " for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)
