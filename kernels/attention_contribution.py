"""From queries, keys and values: online softmax fused with projected values.

    phi[r, j] = softmax_j(scale * q[r] . k[j]) * (w[r] . v[j]),   summed over all keys and over spans of keys

Two dot products per tile (scores and w . v) and scalars per row: there is no (rows x head_dim) accumulator, no head
output and no attention row. Each program takes one split of the keys of one key/value head for all its rows, leaves one
state per row (`softmax_state`), and the pairs of the spans it meets (`spans`); `combine_splits` and `combine_spans`
finish.

Reads keys and values once: 2 * N * Hkv * D elements. Work per key and row: D + 2 Dv multiply-adds (the direction is
split into two halves), one exp2.
"""

import triton
import triton.language as tl

from .keys import product, projections, scores_base2, visible_keys
from .rows import halve, load_bounds, load_rows, row_coordinates, row_scale, split_range
from .softmax_state import NO_COLUMN, merge, tile_softmax
from .spans import write_pairs


@triton.jit(do_not_specialize=["n_keys", "steps", "kv_offset", "n_spans", "n_tiles"])
def attention_contribution_split(
    query_ptr,
    key_ptr,
    value_ptr,
    direction_ptr,
    first_ptr,
    last_ptr,
    hole_ptr,
    low_ptr,
    high_ptr,
    start_ptr,
    end_ptr,
    pair_ptr,
    split_largest_ptr,
    split_denominator_ptr,
    split_total_ptr,
    split_column_ptr,
    pair_largest_ptr,
    pair_mass_ptr,
    pair_phi_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    direction_stride_b,
    direction_stride_h,
    direction_stride_t,
    hole_stride_b,
    scale,
    softcap,
    n_keys,
    steps,
    kv_heads,
    kv_offset,
    n_spans,
    n_tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HOLES: tl.constexpr,
    HALVES: tl.constexpr,
    UNROLLED_SPANS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LANES_D: tl.constexpr,
    LANES_DV: tl.constexpr,
):
    """Grid (row blocks, B * Hkv, splits)."""
    row_block = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, kv_head = kv // kv_heads, kv % kv_heads
    step, head, present = row_coordinates(row_block, steps, GROUP, BLOCK_M)
    q_head = kv_head * GROUP + head.to(tl.int64)
    first, last = load_bounds(first_ptr, last_ptr, batch, steps, step, present, kv_offset, n_keys)
    low, high = split_range(first, last, split, n_keys, SPLIT, BLOCK_N)

    query_ptr += batch * query_stride_b
    q_offsets = q_head * query_stride_h + step * query_stride_t
    query = load_rows(query_ptr, q_offsets, present, 0, HEAD_DIM, LANES_D)
    direction_ptr += batch * direction_stride_b
    w_offsets = q_head * direction_stride_h + step * direction_stride_t
    w_high = load_rows(direction_ptr, w_offsets, present, 0, VALUE_DIM, LANES_DV)
    w_low = w_high
    w_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if HALVES:
        w_scale = row_scale(direction_ptr, w_offsets, present, VALUE_DIM, BLOCK_DV)
        w_high, w_low = halve(w_high, w_scale, value_ptr.dtype.element_ty)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    hole_ptr += batch * hole_stride_b

    # the spans of this split, and where its rows keep their pairs
    low_ptr += batch * n_tiles
    high_ptr += batch * n_tiles
    start_ptr += batch * n_spans
    end_ptr += batch * n_spans
    pair_ptr += batch * n_spans
    rows = tl.num_programs(0) * BLOCK_M
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offset = kv_head * rows + row
    last_tile = tl.minimum((split + 1) * SPLIT, n_keys) - 1
    met = tl.load(low_ptr + split * SPLIT // BLOCK_N) < tl.load(high_ptr + last_tile // BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    column = tl.full([BLOCK_M], NO_COLUMN, tl.int32)
    for start in range(low, high, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        seen = visible_keys(columns, first, last, hole_ptr, n_keys, HOLES)
        products = product(
            query,
            query_ptr,
            q_offsets,
            present,
            key_ptr,
            columns,
            key_stride_n,
            n_keys,
            HEAD_DIM,
            BLOCK_D,
            LANES_D,
        )
        scores = scores_base2(products, seen, scale, softcap, SOFTCAP)
        tile_m, tile_column, weights = tile_softmax(scores, start)
        phi = weights * projections(
            w_high,
            w_low,
            w_scale,
            direction_ptr,
            w_offsets,
            present,
            value_ptr,
            columns,
            value_stride_n,
            n_keys,
            VALUE_DIM,
            BLOCK_DV,
            LANES_DV,
            HALVES,
        )
        m, denominator, total, column = merge(
            m, denominator, total, column, tile_m, tl.sum(weights, axis=1), tl.sum(phi, axis=1), tile_column
        )
        if met:
            write_pairs(
                (low_ptr, high_ptr),
                (start_ptr, end_ptr, pair_ptr),
                (pair_largest_ptr, pair_mass_ptr, pair_phi_ptr),
                start,
                (weights, phi, tile_m),
                row_offset,
                kv_heads * rows,
                UNROLLED_SPANS,
                BLOCK_N,
            )

    offset = (kv * tl.num_programs(2) + split) * rows + row
    tl.store(split_largest_ptr + offset, m)
    tl.store(split_denominator_ptr + offset, denominator)
    tl.store(split_total_ptr + offset, total)
    tl.store(split_column_ptr + offset, column)
