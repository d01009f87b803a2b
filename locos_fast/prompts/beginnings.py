"""The beginnings of texts, as contexts of a given size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from locos_fast.prompts.compose import tokenise
from locos_fast.prompts.text_segments import SENTENCE_END

CHARACTERS_PER_TOKEN = 12  # more than any ordinary prose has


def beginnings(tokenizer: Any, texts: Iterable[str], tokens: int) -> Iterator[str]:
    """The first whole sentences of each text that make at most `tokens` tokens; shorter texts are left out."""
    for text in texts:
        offsets = tokenise(tokenizer, text[: tokens * CHARACTERS_PER_TOKEN]).offsets
        if len(offsets) <= tokens:
            continue
        room = text[: offsets[tokens][0]]
        ends = [match.end() for match in SENTENCE_END.finditer(room)]
        if ends:
            yield room[: ends[-1]].strip()
