"""Keys that single heads of a layer may not see: which heads of an attention call they concern, and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.visibility import Visibility

Sums = TypeVar("Sums", Summary, Contributions)

BEFORE_HEADS = ("visible", "span_visible")  # fields of a result that have no axis of heads: (B, T, ...)

HeadSets = tuple[frozenset[int], ...]
"""Heads of one layer: one set for all rows of a batch, or one for each row."""


class HiddenKeys(NamedTuple):
    """Keys of one layer that are hidden from some of its heads."""

    spans: Tensor  # (B or 1, S, 2) int64 on the CPU, half-open slots
    heads: HeadSets


class HeadsPart(NamedTuple):
    """Heads of one attention call from which the same keys are hidden, and what they read."""

    rows: slice  # of the batch
    heads: slice | list[int]
    kv_heads: slice
    spans: Tensor  # (b or 1, S, 2) of these rows

    def of_heads(self, x: Tensor) -> Tensor:
        """Of a tensor (B, H, ...)."""
        return x[self.rows][:, self.heads]

    def of_keys(self, x: Tensor) -> Tensor:
        """Of keys or values (B, Hkv, ...); a view."""
        return x[self.rows, self.kv_heads]

    def of_rows(self, x: Tensor) -> Tensor:
        """Of a tensor (B or 1, ...)."""
        return x[self.rows] if len(x) > 1 else x

    def of_arguments(self, attention: dict[str, Any]) -> dict[str, Any]:
        """Of the arguments of a function of `locos_fast.ops`."""
        sinks = attention["sinks"]
        return attention if sinks is None else attention | {"sinks": sinks[self.heads]}

    def write(self, whole: Sums, part: Sums) -> None:
        """Put what was summed of these heads into the sums of all."""
        for name in whole._fields:
            if name not in BEFORE_HEADS:
                getattr(whole, name)[self.rows, self.heads] = getattr(part, name)

    def bounds(self, whole: Visibility) -> Visibility:
        """What these rows see where nothing is hidden from a head."""
        first, last = (x if x.ndim == 1 else self.of_rows(x) for x in (whole.first, whole.last))
        holes = None if whole.key_mask is None else whole.key_mask[self.rows]
        return Visibility(first, last, whole.kv_offset, holes)

    def visibility(self, whole: Visibility, key: Tensor) -> Visibility:
        """What the heads see of `key`, as `of_keys` gives it: the hidden keys are holes."""
        bounds = self.bounds(whole)
        seen = ~hidden_columns(self.spans, bounds.kv_offset, key.shape[2], key.device).expand(len(key), -1)
        return bounds._replace(key_mask=seen if bounds.key_mask is None else seen & bounds.key_mask)


def hidden_columns(spans: Tensor, kv_offset: int, n_keys: int, device: torch.device) -> Tensor:
    """(B or 1, N) bool: the columns inside any of (B or 1, S, 2) spans."""
    slot = torch.arange(kv_offset, kv_offset + n_keys, device=device)
    start, end = spans.to(device)[..., None].unbind(2)  # (B or 1, S, 1)
    return ((slot >= start) & (slot < end)).any(1)


def heads_parts(hidden: Sequence[HiddenKeys], batch: int, heads: int, kv_heads: int) -> Iterator[HeadsPart]:
    """The heads of a call of `batch` rows from which keys are hidden, each in exactly one part.

    What several entries hide from one head is hidden together. Raises ValueError for another number of rows.
    """
    for entry in hidden:
        check_rows("heads", len(entry.heads), batch)
        check_rows("needle", len(entry.spans), batch)
    each = any(len(entry.heads) > 1 for entry in hidden)
    for rows in (slice(row, row + 1) for row in range(batch)) if each else (slice(None),):
        sets = [entry.heads[rows.start if len(entry.heads) > 1 else 0] for entry in hidden]
        alike: dict[tuple[int, ...], list[int]] = {}
        for head in sorted(frozenset().union(*sets)):
            alike.setdefault(tuple(i for i, chosen in enumerate(sets) if head in chosen), []).append(head)
        for which, members in alike.items():
            spans = _together([hidden[i].spans for i in which], rows)
            if len(members) == heads:
                yield HeadsPart(rows, slice(None), slice(None), spans)
                continue
            group = heads // kv_heads
            for kv_head in sorted({head // group for head in members}):
                of_group = [head for head in members if head // group == kv_head]
                yield HeadsPart(rows, of_group, slice(kv_head, kv_head + 1), spans)


def check_rows(argument: str, given: int, batch: int) -> None:
    """Raises ValueError unless there is one entry for all rows of a batch, or one for each."""
    if given not in (1, batch):
        raise ValueError(f"{argument}: expected one entry for each of the {batch} rows of the batch, got {given}")


def _together(tables: list[Tensor], rows: slice) -> Tensor:
    tables = [table[rows] if len(table) > 1 else table for table in tables]
    batch = max(map(len, tables))
    return torch.cat([table.expand(batch, -1, -1) for table in tables], 1)
