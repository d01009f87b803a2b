"""From given attention weights and values: sums of phi[r, j] = alpha[r, j] * (w[r] . v[j]) in one pass.

No head output, no per-position map, no repeated V. Plain sums, so splits combine by addition. Reads the weights
(rows x N) and the values (N * Hkv * Dv) once.
"""

import triton
import triton.language as tl

from .keys import projections
from .rows import halve, load_rows, row_coordinates, row_scale
from .softmax_state import NO_COLUMN
from .spans import write_pairs


@triton.jit
def larger(value_a, column_a, value_b, column_b):
    """The larger weight and its column; on a tie the smaller column."""
    take_b = (value_b > value_a) | ((value_b == value_a) & (column_b < column_a))
    return tl.where(take_b, value_b, value_a), tl.where(take_b, column_b, column_a)


@triton.jit(do_not_specialize=["n_keys", "steps", "n_spans", "n_tiles"])
def ov_contribution_split(
    attn_ptr,
    value_ptr,
    direction_ptr,
    low_ptr,
    high_ptr,
    start_ptr,
    end_ptr,
    pair_ptr,
    split_largest_ptr,
    split_mass_ptr,
    split_total_ptr,
    split_column_ptr,
    pair_largest_ptr,
    pair_mass_ptr,
    pair_phi_ptr,
    attn_stride_b,
    attn_stride_h,
    attn_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    direction_stride_b,
    direction_stride_h,
    direction_stride_t,
    n_keys,
    steps,
    kv_heads,
    n_spans,
    n_tiles,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALVES: tl.constexpr,
    UNROLLED_SPANS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LANES_DV: tl.constexpr,
):
    """Grid (row blocks, B * Hkv, splits)."""
    row_block = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, kv_head = kv // kv_heads, kv % kv_heads
    step, head, present = row_coordinates(row_block, steps, GROUP, BLOCK_M)
    q_head = kv_head * GROUP + head.to(tl.int64)
    low = split * SPLIT
    high = tl.minimum(low + SPLIT, n_keys)

    direction_ptr += batch * direction_stride_b
    w_offsets = q_head * direction_stride_h + step * direction_stride_t
    w_high = load_rows(direction_ptr, w_offsets, present, 0, VALUE_DIM, LANES_DV)
    w_low = w_high
    w_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    if HALVES:
        w_scale = row_scale(direction_ptr, w_offsets, present, VALUE_DIM, BLOCK_DV)
        w_high, w_low = halve(w_high, w_scale, value_ptr.dtype.element_ty)
    attn_rows = attn_ptr + batch * attn_stride_b + q_head * attn_stride_h + step * attn_stride_t

    low_ptr += batch * n_tiles
    high_ptr += batch * n_tiles
    start_ptr += batch * n_spans
    end_ptr += batch * n_spans
    pair_ptr += batch * n_spans
    rows = tl.num_programs(0) * BLOCK_M
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_offset = kv_head * rows + row
    met = tl.load(low_ptr + low // BLOCK_N) < tl.load(high_ptr + (high - 1) // BLOCK_N)

    largest = tl.zeros([BLOCK_M], tl.float32)
    column = tl.full([BLOCK_M], NO_COLUMN, tl.int32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(low, high, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        attn_mask = present[:, None] & (columns < n_keys)[None, :]
        weights = tl.load(attn_rows[:, None] + columns[None, :], mask=attn_mask, other=0.0).to(tl.float32)
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
        mass += tl.sum(weights, axis=1)
        total += tl.sum(phi, axis=1)
        tile_largest, index = tl.max(weights, axis=1, return_indices=True)
        tile_column = tl.where(tile_largest > 0.0, start + index, NO_COLUMN)
        largest, column = larger(largest, column, tile_largest, tile_column)
        if met:
            write_pairs(
                (low_ptr, high_ptr),
                (start_ptr, end_ptr, pair_ptr),
                (pair_largest_ptr, pair_mass_ptr, pair_phi_ptr),
                start,
                (weights, phi, largest),
                row_offset,
                kv_heads * rows,
                UNROLLED_SPANS,
                BLOCK_N,
            )

    offset = (kv * tl.num_programs(2) + split) * rows + row
    tl.store(split_largest_ptr + offset, largest)
    tl.store(split_mass_ptr + offset, mass)
    tl.store(split_total_ptr + offset, total)
    tl.store(split_column_ptr + offset, column)


@triton.jit(
    do_not_specialize=["n_splits", "steps"],
    do_not_specialize_on_alignment=["total_mass_ptr", "total_ptr"],
)
def combine_sums(
    split_largest_ptr,
    split_mass_ptr,
    split_total_ptr,
    split_column_ptr,
    total_mass_ptr,
    total_ptr,
    argmax_ptr,
    n_splits,
    steps,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (row blocks, B * Hkv): add the splits' sums into total_mass, total and argmax, (B, H, T)."""
    row_block = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0) * BLOCK_M
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    step, head, present = row_coordinates(row_block, steps, GROUP, BLOCK_M)
    largest = tl.zeros([BLOCK_M], tl.float32)
    column = tl.full([BLOCK_M], NO_COLUMN, tl.int32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_split in range(0, n_splits, BLOCK_S):
        split = first_split + tl.arange(0, BLOCK_S)
        offset = (kv * n_splits + split)[:, None] * rows + row[None, :]
        mask = (split < n_splits)[:, None] & (row >= 0)[None, :]
        mass += tl.sum(tl.load(split_mass_ptr + offset, mask=mask, other=0.0), axis=0)
        total += tl.sum(tl.load(split_total_ptr + offset, mask=mask, other=0.0), axis=0)
        largest_s = tl.load(split_largest_ptr + offset, mask=mask, other=0.0)
        column_s = tl.load(split_column_ptr + offset, mask=mask, other=NO_COLUMN)
        block = tl.reduce((largest_s, column_s), 0, larger)
        largest, column = larger(largest, column, block[0], block[1])
    out = (kv * GROUP + head) * steps + step
    tl.store(total_mass_ptr + out, mass, mask=present)
    tl.store(total_ptr + out, total, mask=present)
    tl.store(argmax_ptr + out, tl.where(column == NO_COLUMN, -1, column).to(tl.int64), mask=present)
