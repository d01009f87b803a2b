"""The needle's spans: checked, joined, and how much of them the answer rows see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from locos_fast.scoring.recording import Recording

Span = tuple[int, int]  # half-open token indices


def union(needle_span: Span | Sequence[Span]) -> list[Span]:
    """Disjoint spans, sorted, that cover what the given ones cover."""
    spans: Any = [needle_span] if _is_pair(needle_span) else needle_span
    if not isinstance(spans, Sequence) or not spans or not all(_is_pair(span) for span in spans):
        raise ValueError(f"needle_span: expected (start, end) or several of them, got {needle_span!r}")
    merged: list[Span] = []
    for start, end in sorted((int(start), int(end)) for start, end in spans):
        if not 0 <= start < end:
            raise ValueError(f"needle_span: expected 0 <= start < end, got ({start}, {end})")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _is_pair(span: Any) -> bool:
    return isinstance(span, Sequence) and len(span) == 2 and all(hasattr(x, "__index__") for x in span)


def check_needle(spans: list[Span], tokens: int, answer_positions: Sequence[int]) -> None:
    for start, end in spans:
        if end > tokens:
            raise ValueError(f"needle_span: expected a span inside the {tokens} tokens, got ({start}, {end})")
        if any(start <= position < end for position in answer_positions):
            raise ValueError(f"needle_span: expected a span clear of the answer, got ({start}, {end})")
        if start > max(answer_positions):
            raise ValueError(f"needle_span: expected a span before the last answer token, got ({start}, {end})")


def visible_shares(recording: Recording, spans: list[Span]) -> dict[str, float]:
    """Layer -> share of the needle's tokens that an answer row of the layer sees, mean over the rows, 0 to 1."""
    needle = sum(end - start for start, end in spans)
    return {
        str(number): float(kept.span_visible[0].sum(-1).double().mean()) / needle for number, kept in recording.items()
    }
