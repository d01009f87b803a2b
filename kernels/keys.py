"""Tiles of keys and values, and the scores of a program's rows against a tile."""

import triton
import triton.language as tl

from .rows import load_rows
from .softmax_state import LOG2_E, tanh


@triton.jit
def load_tile(ptr, columns, stride, n_keys, first_lane, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """(BLOCK_N, LANES) of the vectors of the keys at `columns`; zero past the end. Offsets are 64-bit."""
    lane = first_lane + tl.arange(0, LANES)
    pointers = ptr + columns.to(tl.int64)[:, None] * stride + lane[None, :]
    mask = (columns < n_keys)[:, None]
    if WIDTH % LANES != 0:
        mask = mask & (lane < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def product(
    rows,
    rows_ptr,
    row_offsets,
    present,
    tile_ptr,
    columns,
    stride,
    n_keys,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """rows . tile^T, (BLOCK_M, BLOCK_N) float32; float32 operands are multiplied in full float32, not TF32.

    Without matrix instructions a product of wide float32 vectors does not fit the registers: it is taken LANES at a
    time, and the rows are read again from the cache.
    """
    if LANES == BLOCK_WIDTH:
        tile = load_tile(tile_ptr, columns, stride, n_keys, 0, WIDTH, LANES)
        return tl.dot(rows, tl.trans(tile), input_precision="ieee")
    result = tl.zeros([row_offsets.shape[0], columns.shape[0]], tl.float32)
    for lane in range(0, BLOCK_WIDTH, LANES):
        part = load_rows(rows_ptr, row_offsets, present, lane, WIDTH, LANES)
        tile = load_tile(tile_ptr, columns, stride, n_keys, lane, WIDTH, LANES)
        result = tl.dot(part, tl.trans(tile), result, input_precision="ieee")
    return result


@triton.jit
def visible_keys(columns, first, last, hole_ptr, n_keys, HOLES: tl.constexpr):
    """(BLOCK_M, BLOCK_N) mask: the row's interval, less the holes."""
    seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    if HOLES:
        kept = tl.load(hole_ptr + columns, mask=columns < n_keys, other=0)
        seen = seen & (kept != 0)[None, :]
    return seen


@triton.jit
def scores_base2(products, seen, scale, softcap, SOFTCAP: tl.constexpr):
    """q . k to scores times log2(e), -inf where hidden."""
    scores = products * scale
    if SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    return tl.where(seen, scores * LOG2_E, float("-inf"))
