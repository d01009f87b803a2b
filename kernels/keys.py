"""Tiles of keys and values, and the scores of a program's rows against a tile."""

import triton
import triton.language as tl

from .rows import halve, load_rows
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

    Wide vectors do not fit the registers: their product is taken LANES at a time, and the rows are read again from the
    cache.
    """
    if LANES == BLOCK_WIDTH:
        tile = load_tile(tile_ptr, columns, stride, n_keys, 0, WIDTH, LANES)
        result = tl.dot(rows, tl.trans(tile), input_precision="ieee")
    else:
        result = tl.zeros([row_offsets.shape[0], columns.shape[0]], tl.float32)
        for lane in range(0, WIDTH, LANES):
            part = load_rows(rows_ptr, row_offsets, present, lane, WIDTH, LANES)
            tile = load_tile(tile_ptr, columns, stride, n_keys, lane, WIDTH, LANES)
            result = tl.dot(part, tl.trans(tile), result, input_precision="ieee")
    return result


@triton.jit
def projections(
    w_high,
    w_low,
    w_scale,
    w_ptr,
    w_offsets,
    present,
    value_ptr,
    columns,
    stride,
    n_keys,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    HALVES: tl.constexpr,
):
    """w . v for every row and key of a tile, float32: `product` with a direction in two halves where v has half
    precision."""
    if not HALVES:
        result = product(
            w_high, w_ptr, w_offsets, present, value_ptr, columns, stride, n_keys, WIDTH, BLOCK_WIDTH, LANES
        )
    elif LANES == BLOCK_WIDTH:
        values = tl.trans(load_tile(value_ptr, columns, stride, n_keys, 0, WIDTH, LANES))
        result = (tl.dot(w_high, values) + tl.dot(w_low, values)) * w_scale[:, None]
    else:
        result = tl.zeros([w_offsets.shape[0], columns.shape[0]], tl.float32)
        for lane in range(0, WIDTH, LANES):
            part = load_rows(w_ptr, w_offsets, present, lane, WIDTH, LANES)
            high, low = halve(part, w_scale, value_ptr.dtype.element_ty)
            values = tl.trans(load_tile(value_ptr, columns, stride, n_keys, lane, WIDTH, LANES))
            result = tl.dot(high, values, result)
            result = tl.dot(low, values, result)
        result *= w_scale[:, None]
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
