"""Where the spans of a launch meet the tiles of the keys: planned on the host, once, and kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MOST_UNROLLED_SPANS = 16  # where more spans than that reach into one tile, the kernel loops over them
KEPT = 8  # tables of each kind

Table = TypeVar("Table")


def _kept(build: Callable[..., Table]) -> Callable[..., Table]:
    """`build` copies a table to a device; the last few tables are kept, so that no later call waits for a copy.

    A CUDA graph goes on reading the addresses it was captured with: tables asked for meanwhile are kept for good.
    """
    recent = lru_cache(maxsize=KEPT)(build)
    captured: dict[int, Table] = {}

    @wraps(build)
    def table(*args: Hashable) -> Table:
        found = recent(*args)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            captured[id(found)] = found
        return found

    return table


class SpanPlan(NamedTuple):
    """The table of spans that `kernels/spans.py` describes, on the device, and how many pairs it needs."""

    low: Tensor  # (B, tiles) int32
    high: Tensor  # (B, tiles) int32
    start: Tensor  # (B, S) int32 columns, sorted
    end: Tensor  # (B, S) int32
    pair: Tensor  # (B, S) int64
    unsort: Tensor | None  # (B, S) position of each given span in the table; None if they came sorted
    pairs: int
    local: int  # most spans that may reach into one tile

    @classmethod
    def of(cls, columns: Tensor, batch: int, n_keys: int, block_n: int, device: torch.device) -> SpanPlan:
        """`columns` is (B or 1, S, 2) on the host, where the table is computed."""
        return _span_plan(_flat(columns), columns.shape[0], batch, n_keys, block_n, device)

    @property
    def table(self) -> tuple[Tensor, ...]:
        """What a kernel reads."""
        return self.low, self.high, self.start, self.end, self.pair

    @property
    def unrolled(self) -> int:
        """UNROLLED_SPANS of the kernels: 1, the most, or 0 for a loop. Each is compiled when first met, hence few."""
        if self.local > MOST_UNROLLED_SPANS:
            return 0
        return 1 if self.local <= 1 else MOST_UNROLLED_SPANS

    def restore_order(self, sums: Tensor) -> Tensor:
        """(..., B, H, rows, S) sums in the order the spans were given."""
        if self.unsort is None:
            return sums
        return sums.gather(-1, self.unsort[:, None, None].expand_as(sums))


def _flat(spans: Tensor) -> tuple[int, ...]:
    return tuple(spans.flatten().tolist())


def on_device(spans: Tensor, device: torch.device) -> Tensor:
    """`spans` on `device`; copied once."""
    return _copied(_flat(spans), spans.shape[0], device)


@_kept
def _copied(flat: tuple[int, ...], batch_rows: int, device: torch.device) -> Tensor:
    return torch.tensor(flat, device=device).view(batch_rows, -1, 2)


def span_columns(spans: Tensor, kv_offset: int, batch: int, n_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Start and end column of each span on `device`, (B, S) int32, clipped to the columns present; copied once."""
    return _span_columns(_flat(spans), spans.shape[0], kv_offset, batch, n_keys, device)


@_kept
def _span_columns(
    flat: tuple[int, ...], batch_rows: int, kv_offset: int, batch: int, n_keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    columns = (torch.tensor(flat).view(batch_rows, -1, 2) - kv_offset).clamp(0, n_keys).expand(batch, -1, -1).int()
    start, end = (columns[..., side].clone(memory_format=torch.contiguous_format) for side in (0, 1))
    return start.to(device), end.to(device)


def columns_inside(spans: Tensor, n_keys: int, device: torch.device) -> Tensor:
    """How many of `n_keys` columns lie in each span of columns, (B or 1, S) int64 on `device`; copied once.

    The same tensor for the same spans: not to be written to.
    """
    return _columns_inside(_flat(spans), spans.shape[0], n_keys, device)


@_kept
def _columns_inside(flat: tuple[int, ...], batch_rows: int, n_keys: int, device: torch.device) -> Tensor:
    columns = torch.tensor(flat).view(batch_rows, -1, 2).clamp(0, n_keys)
    return (columns[..., 1] - columns[..., 0]).clamp_min(0).to(device)


@_kept
def _span_plan(
    flat: tuple[int, ...], batch_rows: int, batch: int, n_keys: int, block_n: int, device: torch.device
) -> SpanPlan:
    spans = torch.tensor(flat).view(batch_rows, -1, 2).expand(batch, -1, -1).clamp(0, n_keys)
    spans = spans * (spans[..., 1:] > spans[..., :1])  # a span with no key present becomes (0, 0)
    order = spans[..., 0].argsort(dim=-1, stable=True)
    start, end = (spans[..., side].gather(1, order).contiguous() for side in (0, 1))
    n_tiles = max(1, -(-n_keys // block_n))
    tile_start = (torch.arange(n_tiles) * block_n).expand(batch, -1).contiguous()
    # a span may reach into a tile if it starts before the tile's end and some span up to it ends after the tile's start
    low = torch.searchsorted(end.cummax(-1).values, tile_start, right=True)
    high = torch.maximum(low, torch.searchsorted(start, tile_start + block_n))
    first_tile = start // block_n
    count = torch.where(end > start, (end + block_n - 1) // block_n - first_tile, 0)
    offset = count.flatten().cumsum(0).view_as(count) - count
    unsort = None if torch.equal(order, torch.arange(order.shape[1]).expand_as(order)) else order.argsort(-1)
    return SpanPlan(
        low=low.int().to(device),
        high=high.int().to(device),
        start=start.int().to(device),
        end=end.int().to(device),
        pair=(offset - first_tile).to(device),
        unsort=None if unsort is None else unsort.to(device),
        pairs=int(count.sum()),
        local=int((high - low).max()),
    )
