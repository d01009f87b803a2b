"""Which tokens of a reply are thought aloud and not said: blocks such as <think> ... </think>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from locos_fast.prompts.token_texts import decoded

# opening -> closing marker
MARKERS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<|thinking|>": "<|/thinking|>",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "[THINK]": "[/THINK]",
}
LONGEST = max(map(len, (*MARKERS, *MARKERS.values())))  # characters of a marker
TOKENS_LOOKED_AT = 16  # of a prompt's end


class ThinkingBlocks:
    """Told a reply token by token, it knows which tokens belong to thinking blocks, their markers included.

        blocks = ThinkingBlocks(tokenizer)
        blocks.add(token)
        blocks.marks  # one bool for each token so far

    Markers may be tokens of their own or text of several tokens, which are then all marked once the marker is complete.
    A closing marker whose opening is missing, as where the prompt has opened the block, ends a block that began with
    the reply. prompt_ids: what the reply follows; its end may open a block.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.marks: list[bool] = []
        end = decoded(tokenizer, prompt_ids[-TOKENS_LOOKED_AT:]).rstrip() if len(prompt_ids) else ""
        self.closing = next((MARKERS[opening] for opening in MARKERS if end.endswith(opening)), None)
        self._tail = ""  # text in which a marker may have begun
        self._owners: list[int] = []  # number of the token that each of its characters is from

    @property
    def tokens(self) -> int:
        """How many tokens belong to thinking blocks."""
        return sum(self.marks)

    def add(self, token: int) -> None:
        text = decoded(self.tokenizer, [token])  # markers are ASCII: no character of them is split
        self._tail, self._owners = self._tail + text, self._owners + [len(self.marks)] * len(text)
        self.marks.append(self.closing is not None)
        while self._passed_marker():
            pass
        self._forget(max(0, len(self._tail) - LONGEST))

    def _passed_marker(self) -> bool:
        wanted = (*MARKERS, *MARKERS.values()) if self.closing is None else (self.closing,)
        found = [(self._tail.find(marker), marker) for marker in wanted if marker in self._tail]
        if not found:
            return False
        place, marker = min(found)
        if self.closing is None:
            first = self._owners[place] if marker in MARKERS else 0
            self.marks[first:] = [True] * (len(self.marks) - first)
        self.closing = MARKERS.get(marker)
        self._forget(place + len(marker))
        return True

    def _forget(self, characters: int) -> None:
        self._tail, self._owners = self._tail[characters:], self._owners[characters:]


def thinking_marks(tokenizer: Any, reply_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[bool]:
    """Which tokens of a reply belong to thinking blocks, see `ThinkingBlocks`."""
    blocks = ThinkingBlocks(tokenizer, prompt_ids)
    for token in reply_ids:
        blocks.add(token)
    return blocks.marks
