"""Partial softmax results, base 2, and the one associative function that merges them.

The state of a set of keys, per row: the largest score m, the sum of exp2(score - m), the sum of exp2(score - m) * p
with p the projected value, and the column of the largest score. Tiles merge into splits and splits into the answer by
`merge`. The empty state is (-inf, 0, 0, NO_COLUMN).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_COLUMN = tl.constexpr(2147483647)


@triton.jit
def decay(largest, new_largest):
    """exp2(largest - new_largest), 0 for an empty state: (-inf) - (-inf) would be NaN."""
    return tl.where(largest == float("-inf"), 0.0, tl.exp2(largest - new_largest))


@triton.jit
def merge(m_a, denominator_a, total_a, column_a, m_b, denominator_b, total_b, column_b):
    """The state of the union of two sets of keys; on a tie the smaller column wins, so that order does not matter."""
    m = tl.maximum(m_a, m_b)
    keep_a = decay(m_a, m)
    keep_b = decay(m_b, m)
    take_b = (m_b > m_a) | ((m_b == m_a) & (column_b < column_a))
    return (
        m,
        denominator_a * keep_a + denominator_b * keep_b,
        total_a * keep_a + total_b * keep_b,
        tl.where(take_b, column_b, column_a),
    )


@triton.jit
def tile_softmax(scores, start):
    """Largest score of each row of a tile, its column, and the exponentials; hidden keys have score -inf."""
    m, index = tl.max(scores, axis=1, return_indices=True)
    empty = m == float("-inf")
    exponentials = tl.exp2(scores - tl.where(empty, 0.0, m)[:, None])
    return m, tl.where(empty, NO_COLUMN, start + index), exponentials


@triton.jit
def tanh(x):
    """tanh without libdevice (the interpreter has none): odd series near 0, where 1 - exp cancels."""
    x2 = x * x
    series = x * (1.0 + x2 * (-0.3333333333 + x2 * (0.1333333333 + x2 * (-0.0539682540 + x2 * 0.0218694885))))
    decayed = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    quotient = (1.0 - decayed) / (1.0 + decayed)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -quotient, quotient))
