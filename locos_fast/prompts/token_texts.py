"""Which characters of a text each of its tokens spells, for any vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character yet


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included, spaces as the tokens have them."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text that token ids spell together, and for each token the half-open (start, end) characters that it touches.

    Beginnings of the ids are decoded, not ids one by one: a character whose bytes lie in several tokens is touched by
    all of them, and spaces stand where they do in the whole. A token that adds nothing has an empty span; so have the
    last ones if they leave a character unfinished, which is then no part of the text.
    """
    beginnings = [decoded(tokenizer, ids[:count]) for count in range(len(ids) + 1)]
    text = [beginning for beginning in beginnings if not beginning.endswith(UNFINISHED)][-1]  # the first is empty
    spans, done = [], 0  # characters of the text that are complete
    for beginning in beginnings[1:]:
        common = _common(beginning, text)
        start, done = done, max(done, common)
        unfinished = beginning.endswith(UNFINISHED) and common < len(beginning)
        spans.append((start, min(done + unfinished, len(text))))
    return text, spans


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
