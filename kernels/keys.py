"""Tiles of keys and values, and the scores of a program's rows against a tile."""

import triton
import triton.language as tl

from .softmax_state import LOG2_E, tanh


@triton.jit
def load_tile(ptr, columns, stride, n_keys, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """(BLOCK_N, BLOCK_WIDTH) vectors of the keys at `columns`; zero past the end. Offsets are 64-bit."""
    lane = tl.arange(0, BLOCK_WIDTH)
    pointers = ptr + columns.to(tl.int64)[:, None] * stride + lane[None, :]
    mask = (columns < n_keys)[:, None]
    if BLOCK_WIDTH != WIDTH:
        mask = mask & (lane < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def visible_keys(columns, first, last, hole_ptr, n_keys, HOLES: tl.constexpr):
    """(BLOCK_M, BLOCK_N) mask: the row's interval, less the holes."""
    seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    if HOLES:
        kept = tl.load(hole_ptr + columns, mask=columns < n_keys, other=0)
        seen = seen & (kept != 0)[None, :]
    return seen


@triton.jit
def scores_base2(query, keys, seen, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores times log2(e), -inf where hidden; float32 keys are multiplied in full float32, not TF32."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    return tl.where(seen, scores * LOG2_E, float("-inf"))


@triton.jit
def project(high, low, values, HALVES: tl.constexpr):
    """w . v for every row and key of a tile, float32; `low` is the rest of the direction in half precision."""
    projected = tl.dot(high, tl.trans(values), input_precision="ieee")
    if HALVES:
        projected += tl.dot(low, tl.trans(values), input_precision="ieee")
    return projected
