"""Sums over any number of spans of keys, in the one pass over the keys.

A span covers whole tiles but for its two ends, so its sum is cut into (span, tile) pairs. The program that holds a tile
writes the pairs of the spans that reach into it, each relative to the tile's own largest score; `combine_spans` adds a
span's pairs in the order of its tiles. A pair nobody wrote (its tile is hidden from every row) keeps largest = -inf.

The table of spans is sorted by start, per batch row: `start` and `end` columns, and `pair`, such that pair + tile is
the index of the pair. The spans that may reach into tile i are numbers low[i] ... high[i] - 1 of the table.
"""

import triton
import triton.language as tl

from .rows import row_coordinates
from .softmax_state import decay


@triton.jit
def write_pair(span, table, pairs, tile_start, tile_sums, row_offset, pair_stride, BLOCK_N: tl.constexpr):
    """Sum one span's share of a tile: its weights into mass, its weights times projected values into phi."""
    start_ptr, end_ptr, pair_ptr = table
    pair_largest_ptr, pair_mass_ptr, pair_phi_ptr = pairs
    weights, phi, largest = tile_sums
    begin = tl.load(start_ptr + span)
    end = tl.load(end_ptr + span)
    if tl.maximum(begin, tile_start) < tl.minimum(end, tile_start + BLOCK_N):
        columns = tile_start + tl.arange(0, BLOCK_N)
        inside = ((columns >= begin) & (columns < end))[None, :]
        pair = tl.load(pair_ptr + span) + tile_start // BLOCK_N
        offset = pair * pair_stride + row_offset
        tl.store(pair_largest_ptr + offset, largest)
        tl.store(pair_mass_ptr + offset, tl.sum(tl.where(inside, weights, 0.0), axis=1))
        tl.store(pair_phi_ptr + offset, tl.sum(tl.where(inside, phi, 0.0), axis=1))


@triton.jit
def write_pairs(
    reached,
    table,
    pairs,
    tile_start,
    tile_sums,
    row_offset,
    pair_stride,
    UNROLLED_SPANS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The pairs of every span that reaches into a tile.

    reached: pointers to low and high. table: to start, end and pair. pairs: to largest, mass and phi. tile_sums: the
    tile's weights, weights times projected values, and the largest score of each row.

    A few spans are unrolled, because a loop inside the loop over tiles would keep the next tile from being fetched
    ahead; where more spans than that meet one tile (single tokens, say), UNROLLED_SPANS is 0 and they are looped over.
    """
    low_ptr, high_ptr = reached
    span = tl.load(low_ptr + tile_start // BLOCK_N)
    end_span = tl.load(high_ptr + tile_start // BLOCK_N)
    if UNROLLED_SPANS == 0:
        for one in range(span, end_span):
            write_pair(one, table, pairs, tile_start, tile_sums, row_offset, pair_stride, BLOCK_N)
    for _ in tl.static_range(UNROLLED_SPANS):
        if span < end_span:
            write_pair(span, table, pairs, tile_start, tile_sums, row_offset, pair_stride, BLOCK_N)
        span += 1


@triton.jit(
    do_not_specialize=["steps", "n_spans", "block_n"],
    do_not_specialize_on_alignment=["largest_ptr", "inverse_ptr", "mass_ptr", "span_ptr"],
)
def combine_spans(
    start_ptr,
    end_ptr,
    pair_ptr,
    pair_largest_ptr,
    pair_mass_ptr,
    pair_phi_ptr,
    largest_ptr,
    inverse_ptr,
    mass_ptr,
    span_ptr,
    steps,
    n_spans,
    kv_heads,
    block_n,
    GROUP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (S, row blocks, B * Hkv): add a span's pairs, as attention weights, into mass and span, (B, H, T, S).

    block_n: keys per tile of the kernel that wrote the pairs.
    """
    span = tl.program_id(0)  # spans may be many: only the first axis takes more than 65,535 programs
    row_block = tl.program_id(1)
    kv = tl.program_id(2).to(tl.int64)
    batch = kv // kv_heads
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.num_programs(1) * BLOCK_M
    entry = batch * n_spans + span
    begin = tl.load(start_ptr + entry)
    end = tl.load(end_ptr + entry)
    pair = tl.load(pair_ptr + entry)
    mass = tl.zeros([BLOCK_M], tl.float32)
    phi = tl.zeros([BLOCK_M], tl.float32)
    if SOFTMAX:
        largest = tl.load(largest_ptr + kv * rows + row)
        inverse = tl.load(inverse_ptr + kv * rows + row)
    for first_tile in range(begin // block_n, (end + block_n - 1) // block_n, BLOCK_T):
        tile = first_tile + tl.arange(0, BLOCK_T)
        mask = (tile * block_n < end)[:, None] & (row >= 0)[None, :]
        index = (pair + tile.to(tl.int64)) * kv_heads + kv % kv_heads
        offset = index[:, None] * rows + row[None, :]
        pair_largest = tl.load(pair_largest_ptr + offset, mask=mask, other=float("-inf"))
        written = pair_largest != float("-inf")
        tile_mass = tl.load(pair_mass_ptr + offset, mask=mask & written, other=0.0)
        tile_phi = tl.load(pair_phi_ptr + offset, mask=mask & written, other=0.0)
        if SOFTMAX:
            to_alpha = decay(pair_largest, largest[None, :]) * inverse[None, :]
            tile_mass *= to_alpha
            tile_phi *= to_alpha
        mass += tl.sum(tile_mass, axis=0)
        phi += tl.sum(tile_phi, axis=0)
    step, head, present = row_coordinates(row_block, steps, GROUP, BLOCK_M)
    out = ((kv * GROUP + head) * steps + step) * n_spans + span
    tl.store(mass_ptr + out, mass, mask=present)
    tl.store(span_ptr + out, phi, mask=present)
