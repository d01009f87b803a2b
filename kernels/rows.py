"""The rows of a program: the query heads of one key/value head x the answer steps, so that keys and values are read
once.

Row r is answer step r // GROUP of query head r % GROUP in the group.
"""

import triton
import triton.language as tl


@triton.jit
def row_coordinates(row_block, steps, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(answer step, query head within the group, whether the row exists) of each row of a program; steps are 64-bit."""
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    return (row // GROUP).to(tl.int64), row % GROUP, row < steps * GROUP


@triton.jit
def load_rows(ptr, offsets, present, first_lane, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """(BLOCK_M, LANES) of the row vectors, last stride 1; zero outside."""
    lane = first_lane + tl.arange(0, LANES)
    mask = present[:, None] & (lane < WIDTH)[None, :]
    return tl.load(ptr + offsets[:, None] + lane[None, :], mask=mask, other=0.0)


@triton.jit
def load_bounds(first_ptr, last_ptr, batch, steps, step, present, kv_offset, n_keys):
    """First and one-past-last visible column of each row; absent rows see nothing."""
    offset = batch * steps + step
    first = tl.load(first_ptr + offset, mask=present, other=0) - kv_offset
    last = tl.load(last_ptr + offset, mask=present, other=0) - kv_offset
    first = tl.minimum(tl.maximum(first, 0), n_keys).to(tl.int32)
    last = tl.minimum(tl.maximum(last, 0), n_keys).to(tl.int32)
    return tl.where(present, first, n_keys), tl.where(present, last, 0)


@triton.jit
def split_range(first, last, split, n_keys, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns [low, high) of the split that some row sees, low rounded down to a tile; empty splits load nothing."""
    low = tl.maximum(split * SPLIT, tl.min(first, axis=0))
    high = tl.minimum(tl.minimum((split + 1) * SPLIT, n_keys), tl.max(last, axis=0))
    return low // BLOCK_N * BLOCK_N, high


@triton.jit
def row_scale(ptr, offsets, present, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The largest magnitude in each row vector, 1 where it is zero."""
    largest = tl.max(tl.abs(load_rows(ptr, offsets, present, 0, WIDTH, BLOCK_WIDTH)), axis=1)
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def halve(direction, scale, DTYPE: tl.constexpr):
    """A float32 direction, scaled to 1, as the sum of two values in half precision.

    Together they keep 16 (bfloat16) or 22 (float16) bits; scaling keeps float16 clear of its subnormals.
    """
    direction = direction / scale[:, None]
    high = direction.to(DTYPE)
    return high, (direction - high.to(tl.float32)).to(DTYPE)
