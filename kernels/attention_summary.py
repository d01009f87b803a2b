"""The lean path of scoring: one pass over the keys for the softmax statistics, then only the spans' keys and values.

    lse[r] = log sum_j exp(scale * q[r] . k[j])          span_output[r, s] = sum over span s of alpha[r, j] v[j]

The sum over all keys is the head output, which the model computes anyway, so nothing else of V is needed. Reads
N * Hkv * D elements in the first kernel, a few tiles in the second.
"""

import triton
import triton.language as tl

from .keys import load_tile, product, scores_base2, visible_keys
from .rows import load_bounds, load_rows, row_coordinates, split_range
from .softmax_state import NO_COLUMN, decay, merge, tile_softmax

WEIGHT_SCALE = tl.constexpr(32768.0)  # lifts weights out of float16's subnormals before they are split into halves


@triton.jit(do_not_specialize=["n_keys", "steps", "kv_offset"])
def attention_summary_split(
    query_ptr,
    key_ptr,
    first_ptr,
    last_ptr,
    hole_ptr,
    split_largest_ptr,
    split_denominator_ptr,
    split_column_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    hole_stride_b,
    scale,
    softcap,
    n_keys,
    steps,
    kv_heads,
    kv_offset,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HOLES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES_D: tl.constexpr,
):
    """Grid (row blocks, B * Hkv, splits): the state of every row on one split of the keys."""
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
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    hole_ptr += batch * hole_stride_b

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
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
        tile_sum = tl.sum(weights, axis=1)
        m, denominator, _, column = merge(m, denominator, 0.0, column, tile_m, tile_sum, 0.0, tile_column)

    rows = tl.num_programs(0) * BLOCK_M
    offset = (kv * tl.num_programs(2) + split) * rows + row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(split_largest_ptr + offset, m)
    tl.store(split_denominator_ptr + offset, denominator)
    tl.store(split_column_ptr + offset, column)


@triton.jit(do_not_specialize=["n_keys", "steps", "kv_offset", "n_spans", "rows"])
def span_output(
    query_ptr,
    key_ptr,
    value_ptr,
    first_ptr,
    last_ptr,
    hole_ptr,
    start_ptr,
    end_ptr,
    largest_ptr,
    inverse_ptr,
    mass_ptr,
    output_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    hole_stride_b,
    scale,
    softcap,
    n_keys,
    steps,
    kv_heads,
    kv_offset,
    n_spans,
    rows,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HOLES: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES_D: tl.constexpr,
    LANES_DV: tl.constexpr,
):
    """Grid (S * value chunks, row blocks, B * Hkv): mass (B, H, T, S) and output (B, H, T, S, Dv) of one span.

    A program accumulates LANES_DV lanes of the output; wide values are cut into chunks, and each chunk's program
    computes the scores of the span's few keys again.
    """
    span = tl.program_id(0) % n_spans  # only the first axis takes more than 65,535 programs
    first_lane = tl.program_id(0) // n_spans * LANES_DV
    row_block = tl.program_id(1)
    kv = tl.program_id(2).to(tl.int64)
    batch, kv_head = kv // kv_heads, kv % kv_heads
    step, head, present = row_coordinates(row_block, steps, GROUP, BLOCK_M)
    q_head = kv_head * GROUP + head.to(tl.int64)
    first, last = load_bounds(first_ptr, last_ptr, batch, steps, step, present, kv_offset, n_keys)
    first = tl.maximum(first, tl.load(start_ptr + batch * n_spans + span))
    last = tl.minimum(last, tl.load(end_ptr + batch * n_spans + span))
    low, high = tl.min(first, axis=0), tl.max(last, axis=0)
    query_ptr += batch * query_stride_b
    q_offsets = q_head * query_stride_h + step * query_stride_t
    query = load_rows(query_ptr, q_offsets, present, 0, HEAD_DIM, LANES_D)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    hole_ptr += batch * hole_stride_b
    row = kv * rows + row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    largest = tl.load(largest_ptr + row, mask=present, other=0.0)
    inverse = tl.load(inverse_ptr + row, mask=present, other=0.0)

    mass = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, LANES_DV], tl.float32)
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
        weights = decay(scores, largest[:, None]) * WEIGHT_SCALE
        mass += tl.sum(weights, axis=1)
        values = load_tile(value_ptr, columns, value_stride_n, n_keys, first_lane, VALUE_DIM, LANES_DV)
        weights_high = weights.to(values.dtype)
        output = tl.dot(weights_high, values, output, input_precision="ieee")
        if HALVES:
            weights_low = (weights - weights_high.to(tl.float32)).to(values.dtype)
            output = tl.dot(weights_low, values, output, input_precision="ieee")

    to_alpha = inverse / WEIGHT_SCALE
    lane = first_lane + tl.arange(0, LANES_DV)
    out = ((batch * kv_heads * GROUP + q_head) * steps + step) * n_spans + span
    tl.store(mass_ptr + out, mass * to_alpha, mask=present)
    output_mask = present[:, None] & (lane < VALUE_DIM)[None, :]
    tl.store(output_ptr + out[:, None] * VALUE_DIM + lane[None, :], output * to_alpha[:, None], mask=output_mask)
