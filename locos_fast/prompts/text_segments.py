"""Cut the tokens of a text into segments: sentences, paragraphs, blocks of tokens, or spans given by hand."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

Span = tuple[int, int]  # half-open
Rule = str | int | list[Span]  # "sentences", "paragraphs", tokens per block, or the spans themselves

BLANK_LINES = r"\n(?:[^\S\n]*\n)+"  # not the indentation of what follows
PARAGRAPH_END = re.compile(BLANK_LINES)
STOP = r"""[.!?…؟۔।॥።։]["'”’“‘»«›‹)\]}]*(?=\s)"""
WIDE_STOP = r"""[。！？｡]+["'”’」』）】》〉)\]]*"""  # of scripts that put no white space between sentences
SENTENCE_END = re.compile(f"{STOP}|{WIDE_STOP}|{BLANK_LINES}")
"""Where a sentence ends: at a stop with the quotes and brackets it closes, or at blank lines; a single newline, as
of text wrapped by hand, ends none."""
UNIT_ENDS = {"sentences": SENTENCE_END, "paragraphs": PARAGRAPH_END}
INTEGER, SPAN = re.compile(r"[+-]?\d{1,18}"), re.compile(r"(\d{1,18}):(\d{1,18})")


class Cover(NamedTuple):
    """How segments lie on the tokens of a text; all counts but the first are tokens."""

    segments: int
    tokens: int
    covered: int
    uncovered: int
    in_several: int

    def __str__(self) -> str:
        return (
            f"{self.segments} segments cover {self.covered} of {self.tokens} tokens; {self.uncovered} tokens lie in no "
            f"segment, {self.in_several} in more than one"
        )


def parse_rule(given: str) -> Rule:
    """Read sentences, paragraphs, N or START:END,START:END,... Raises ValueError, naming `segments`, for all else."""
    given = given.strip()
    if given in UNIT_ENDS:
        return given
    if INTEGER.fullmatch(given):
        if int(given) < 1:
            raise ValueError(f"segments: expected blocks of at least one token, got {given}")
        return int(given)
    matches = [SPAN.fullmatch(part.strip()) for part in given.split(",")]
    spans = [(int(match[1]), int(match[2])) for match in matches if match]
    if len(spans) < len(matches):
        raise ValueError(f"segments: expected {', '.join(UNIT_ENDS)}, N or START:END,..., got {_shortened(given)!r}")
    for start, end in spans:
        if start >= end:
            raise ValueError(f"segments: expected START < END, got {start}:{end}")
    return spans


def cut(text: str, offsets: Sequence[Span], rule: Rule, *, leading: int = 0) -> list[Span]:
    """Token spans of the segments of a text.

    offsets: the characters of each token. rule: see `parse_rule`. leading: number of special tokens at the beginning.

    Except where the rule is a list of spans, the result is a partition: each token lies in exactly one segment. The
    leading special tokens, on which attention sinks rest, are a segment of their own. A token belongs to the sentence
    or paragraph in which its first character stands, one without characters to that of the token before it; sentences
    and paragraphs with no more than white space join the one before them (the first one the next).
    Raises ValueError, naming `segments`, for a span beyond the tokens.
    """
    tokens = len(offsets)
    if isinstance(rule, list):
        for start, end in rule:
            if end > tokens:
                raise ValueError(f"segments: expected spans inside the prompt's {tokens} tokens, got {start}:{end}")
        return rule
    head = [(0, leading)] if leading else []
    if isinstance(rule, int):
        return head + [(start, min(start + rule, tokens)) for start in range(leading, tokens, rule)]
    starts = [leading, *_unit_starts(text, offsets, rule, leading)]
    return head + _without_blank(text, offsets, [*_pairs(starts, tokens)])


def text_of(text: str, offsets: Sequence[Span], span: Span) -> str:
    """The characters from the first to the last that the tokens of a span stand for."""
    inside = [(low, high) for low, high in offsets[slice(*span)] if low < high]
    return text[min(low for low, _ in inside) : max(high for _, high in inside)] if inside else ""


def cover(segments: Sequence[Span], tokens: int) -> Cover:
    """Count how often the segments cover each token of a text."""
    steps = [0] * (tokens + 1)  # +1 where a segment begins, -1 where one ends
    for start, end in segments:
        steps[start] += 1
        steps[end] -= 1
    depth = list(accumulate(steps[:-1]))
    uncovered = depth.count(0)
    return Cover(len(segments), tokens, tokens - uncovered, uncovered, sum(count > 1 for count in depth))


def _unit_starts(text: str, offsets: Sequence[Span], rule: str, leading: int) -> list[int]:
    """Tokens, after the first that is not special, with which a sentence or paragraph begins."""
    ends = [match.end() for match in UNIT_ENDS[rule].finditer(text)]
    starts = []
    unit = None
    for token, (low, high) in enumerate(offsets[leading:], leading):
        if low == high:
            continue
        found = bisect_right(ends, low)
        if unit is not None and found > unit:
            starts.append(token)
        unit = found if unit is None else max(unit, found)
    return starts


def _pairs(starts: list[int], tokens: int) -> list[Span]:
    return [(start, end) for start, end in pairwise([*starts, tokens]) if start < end]


def _without_blank(text: str, offsets: Sequence[Span], spans: list[Span]) -> list[Span]:
    kept: list[Span] = []
    for start, end in spans:
        blank = not text_of(text, offsets, (start, end)).strip()
        first_is_blank = len(kept) == 1 and not text_of(text, offsets, kept[0]).strip()
        if kept and (blank or first_is_blank):
            kept[-1] = (kept[-1][0], end)
        else:
            kept.append((start, end))
    return kept


def _shortened(given: str, most: int = 60) -> str:
    return given if len(given) <= most else f"{given[:most]}..."
