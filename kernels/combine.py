"""Merge the states of all splits of a row into its softmax statistics, in a fixed order."""

import triton
import triton.language as tl

from .rows import row_coordinates
from .softmax_state import LN_2, LOG2_E, NO_COLUMN, decay, merge


@triton.jit(
    do_not_specialize=["n_splits", "steps", "kv_offset"],
    do_not_specialize_on_alignment=["sink_ptr", "lse_ptr", "total_mass_ptr", "total_ptr"],
)
def combine_splits(
    split_largest_ptr,
    split_denominator_ptr,
    split_total_ptr,
    split_column_ptr,
    sink_ptr,
    largest_ptr,
    inverse_ptr,
    lse_ptr,
    total_mass_ptr,
    total_ptr,
    argmax_ptr,
    n_splits,
    steps,
    kv_heads,
    kv_offset,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (row blocks, B * Hkv). Reads (B * Hkv, splits, rows) states; writes lse, masses, total, argmax (B, H, T)

    and, for the kernels that follow, each row's largest score (base 2) and 1 / its denominator. Where nothing was
    projected, the caller gives any other sum for `split_total_ptr` and does not read the total.
    """
    row_block = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0) * BLOCK_M
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    step, head, present = row_coordinates(row_block, steps, GROUP, BLOCK_M)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    column = tl.full([BLOCK_M], NO_COLUMN, tl.int32)
    for first_split in range(0, n_splits, BLOCK_S):
        split = first_split + tl.arange(0, BLOCK_S)
        offset = (kv * n_splits + split)[:, None] * rows + row[None, :]
        mask = (split < n_splits)[:, None] & (row >= 0)[None, :]
        m_s = tl.load(split_largest_ptr + offset, mask=mask, other=float("-inf"))
        denominator_s = tl.load(split_denominator_ptr + offset, mask=mask, other=0.0)
        total_s = tl.load(split_total_ptr + offset, mask=mask, other=0.0)
        column_s = tl.load(split_column_ptr + offset, mask=mask, other=NO_COLUMN)
        block = tl.reduce((m_s, denominator_s, total_s, column_s), 0, merge)
        m, denominator, total, column = merge(m, denominator, total, column, block[0], block[1], block[2], block[3])

    largest = m
    whole = denominator
    if SINKS:
        sink = tl.load(sink_ptr + (kv % kv_heads) * GROUP + head, mask=present, other=0.0).to(tl.float32) * LOG2_E
        largest = tl.maximum(m, sink)
        whole = denominator * decay(m, largest) + tl.exp2(sink - largest)
    inverse = tl.where(whole > 0.0, 1.0 / whole, 0.0)
    tl.store(largest_ptr + kv * rows + row, largest)
    tl.store(inverse_ptr + kv * rows + row, inverse)

    to_alpha = decay(m, largest) * inverse
    lse = tl.where(whole > 0.0, (largest + tl.log2(whole)) * LN_2, float("-inf"))
    out = (kv * GROUP + head) * steps + step
    tl.store(lse_ptr + out, lse, mask=present)
    tl.store(total_mass_ptr + out, denominator * to_alpha, mask=present)
    tl.store(argmax_ptr + out, tl.where(column == NO_COLUMN, -1, column.to(tl.int64) + kv_offset), mask=present)
    tl.store(total_ptr + out, total * to_alpha, mask=present)
