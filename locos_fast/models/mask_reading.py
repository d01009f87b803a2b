"""Read from the mask that a layer's attention was given which keys each answer row sees.

The mask is the truth about windows, chunks and padding: whatever the model asked for, its attention used this. Each
attention implementation takes its own kind (see transformers' `masking_utils`): a dense bool or additive tensor, a
BlockMask, a 2-D padding mask beside flags, or nothing at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.ops.visibility import Visibility


class RowsSeen(NamedTuple):
    """Rows of one call that share one `Visibility`."""

    steps: list[int]  # which of the call's rows
    visibility: Visibility


class Call(NamedTuple):
    """One call of an attention function, as far as visibility depends on it."""

    rows: Tensor  # (B or 1, T) int64 on the CPU: query index of each answer row within the call
    batch: int
    n_queries: int
    n_keys: int
    kv_offset: int  # slot of the first key column
    device: torch.device


def read_visibility(
    mask: Any, call: Call, *, implementation: str, is_causal: bool, window: int | None
) -> list[RowsSeen]:
    """Which keys the rows of `call` see; one entry unless holes differ between rows."""
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _from_dense(_dense_rows(mask, call), call)
    if hasattr(mask, "mask_mod"):  # BlockMask of flex_attention
        return _from_dense(_block_mask_rows(mask, call), call)
    flash = "flash" in implementation
    if flash and not is_causal:
        raise UnsupportedModelError("cannot record flash attention that is not causal")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return _from_dense(_aligned_causal(call, window) & mask[:, None, -call.n_keys :].bool(), call)
    if mask is not None:
        raise UnsupportedModelError(f"cannot read an attention mask of type {type(mask).__name__}")
    if implementation == "eager" or (implementation == "sdpa" and (call.n_queries == 1 or not is_causal)):
        return [_interval(call, torch.zeros_like(call.rows), torch.full_like(call.rows, call.n_keys))]
    # no mask: PyTorch's is_causal counts from the first column, flash attention from the last; equal without a cache
    shift = call.n_keys - call.n_queries if flash else 0
    last = call.rows + shift + 1
    first = torch.zeros_like(last) if window is None or not flash else (last - window).clamp(min=0)
    return [_interval(call, first, last)]


def _interval(call: Call, first: Tensor, last: Tensor) -> RowsSeen:
    visibility = Visibility(first + call.kv_offset, last + call.kv_offset, call.kv_offset).to(call.device)
    return RowsSeen(list(range(call.rows.shape[1])), visibility)


def _dense_rows(mask: Tensor, call: Call) -> Tensor:
    """The rows' share of a (B or 1, 1, Sq, N) mask, bool."""
    if mask.shape[1] != 1:
        raise UnsupportedModelError("cannot record attention with a different mask for each head")
    rows = select_rows(mask[:, 0, :, : call.n_keys], call.rows)
    if rows.dtype == torch.bool:
        return rows
    hidden = rows <= torch.finfo(rows.dtype).min / 2
    if not bool((hidden | (rows == 0)).all()):
        raise UnsupportedModelError("cannot record attention with a position bias in its mask")
    return ~hidden


def _block_mask_rows(mask: Any, call: Call) -> Tensor:
    batch = torch.arange(call.batch, device=call.device)[:, None, None]
    column = torch.arange(call.n_keys, device=call.device)[None, None, :]
    seen = mask.mask_mod(batch, torch.zeros_like(batch), call.rows.to(call.device)[..., None], column)
    return seen.expand(call.batch, call.rows.shape[1], call.n_keys)


def _aligned_causal(call: Call, window: int | None) -> Tensor:
    """(B or 1, T, N): causal with the last query at the last column, as flash attention aligns it."""
    last = call.rows.to(call.device)[..., None] + call.n_keys - call.n_queries
    column = torch.arange(call.n_keys, device=call.device)
    seen = column <= last
    return seen if window is None else seen & (column > last - window)


def _from_dense(seen: Tensor, call: Call) -> list[RowsSeen]:
    """Two integers per row, and the holes; rows whose holes differ are read one by one."""
    seen = seen.expand(call.batch, -1, -1)
    any_seen = seen.any(-1)
    first = torch.where(any_seen, seen.int().argmax(-1), 0)
    last = torch.where(any_seen, call.n_keys - seen.flip(-1).int().argmax(-1), 0)
    bounds = Visibility(first + call.kv_offset, last + call.kv_offset, call.kv_offset)
    holes = bounds.mask(call.batch, call.n_keys) & ~seen
    everyone = list(range(seen.shape[1]))
    if not bool(holes.any()):
        return [RowsSeen(everyone, bounds)]
    hole_somewhere = holes.any(1)
    if not bool((seen & hole_somewhere[:, None]).any()):
        return [RowsSeen(everyone, bounds._replace(key_mask=~hole_somewhere))]
    return [
        RowsSeen([t], Visibility(bounds.first[:, [t]], bounds.last[:, [t]], call.kv_offset, ~holes[:, t]))
        for t in everyone
    ]


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x: (B or 1, Sq, ...). Rows (1, T) are taken from every batch row, rows (B, T) from each its own.

    Consecutive rows, the usual case, are a view: no copy, and no wait for the device.
    """
    if rows.shape[0] == 1:
        first, count = int(rows[0, 0]), rows.shape[1]
        if torch.equal(rows[0], torch.arange(first, first + count)):
            return x[:, first : first + count]
        return x.index_select(1, rows[0].to(x.device))
    batch = torch.arange(rows.shape[0], device=x.device)[:, None] if x.shape[0] > 1 else 0
    return x[batch, rows.to(x.device)]
