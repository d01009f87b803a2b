"""The Triton `merge` and `tanh` alone, each through a kernel that does nothing else."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from locos_fast.kernels.softmax_state import NO_COLUMN, merge, tanh

# the interpreter computes both sides of tl.where, NumPy warns of the one that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROWS = 64
EMPTY_COLUMN = NO_COLUMN.value
ROUNDING = 16 * 2.0**-24  # two merges: two factors, two products and two sums on either way, each rounded to 2^-24


@triton.jit
def merge_kernel(a_ptr, a_column_ptr, b_ptr, b_column_ptr, out_ptr, out_column_ptr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    m, denominator, total, column = merge(
        tl.load(a_ptr + row),
        tl.load(a_ptr + ROWS + row),
        tl.load(a_ptr + 2 * ROWS + row),
        tl.load(a_column_ptr + row),
        tl.load(b_ptr + row),
        tl.load(b_ptr + ROWS + row),
        tl.load(b_ptr + 2 * ROWS + row),
        tl.load(b_column_ptr + row),
    )
    tl.store(out_ptr + row, m)
    tl.store(out_ptr + ROWS + row, denominator)
    tl.store(out_ptr + 2 * ROWS + row, total)
    tl.store(out_column_ptr + row, column)


@triton.jit
def tanh_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, tanh(tl.load(x_ptr + index)))


class State(NamedTuple):
    sums: torch.Tensor  # (3, ROWS) float32: largest score in base 2, denominator, total
    column: torch.Tensor  # (ROWS,) int32

    @classmethod
    def random(cls, first_column: int, *, empty: float = 0.0) -> "State":
        """The states of a hundred keys from `first_column` on; a share of the rows saw none of them."""
        sums = torch.stack([20 * torch.randn(ROWS), 1 + 99 * torch.rand(ROWS), 100 * torch.randn(ROWS)])
        column = torch.randint(first_column, first_column + 100, (ROWS,), dtype=torch.int32)
        unseen = torch.rand(ROWS) < empty
        sums = torch.where(unseen, torch.tensor([[-torch.inf], [0.0], [0.0]]), sums)
        return cls(sums, torch.where(unseen, EMPTY_COLUMN, column).int())

    def tied(self, other: "State") -> "State":
        """This state with, in every third row that saw something in both, the largest score of `other`."""
        tie = (torch.arange(ROWS) % 3 == 0) & self.sums[0].isfinite() & other.sums[0].isfinite()
        largest = torch.where(tie, other.sums[0], self.sums[0])
        return self._replace(sums=torch.cat([largest[None], self.sums[1:]]))

    def merged(self, other: "State") -> "State":
        out = State(torch.full_like(self.sums, torch.nan), torch.full_like(self.column, -7))
        merge_kernel[(1,)](*self, *other, *out, ROWS=ROWS)
        return out


def assert_identical(a: State, b: State) -> None:
    assert torch.equal(a.sums, b.sums) and torch.equal(a.column, b.column)


def assert_same(a: State, b: State, terms: torch.Tensor) -> None:
    """Equal up to float32 rounding of sums of absolute value `terms`, (2, ROWS)."""
    assert torch.equal(a.sums[0], b.sums[0]) and torch.equal(a.column, b.column)
    assert ((a.sums[1:] - b.sums[1:]).abs() <= ROUNDING * terms).all()  # False for NaN


def test_merge_is_associative():
    a, b, c = (State.random(100 * index, empty=0.4) for index in range(3))
    terms = sum(state.sums[1:].abs() for state in (a, b, c))
    assert_same(a.merged(b).merged(c), a.merged(b.merged(c)), terms)


def test_merge_is_commutative_to_the_bit():
    """On a tie the smaller column wins, whichever state comes first."""
    a = State.random(0, empty=0.3)
    b = State.random(50, empty=0.3).tied(a)
    assert_identical(a.merged(b), b.merged(a))


def test_the_empty_state_is_neutral():
    state, empty = State.random(0, empty=0.3), State.random(0, empty=1.0)
    assert_identical(state.merged(empty), state)
    assert_identical(empty.merged(state), state)
    assert_identical(empty.merged(empty), empty)


def test_a_tie_picks_the_smaller_column():
    a, b = State.random(100), State.random(0)
    b.sums[0] = a.sums[0]
    for merged in (a.merged(b), b.merged(a)):
        assert torch.equal(merged.column, b.column)


def test_a_part_that_is_far_below_vanishes_without_overflow():
    a, b = State.random(0), State.random(100)
    a.sums[0], b.sums[0] = 3e38, -3e38  # their difference overflows to -inf, and exp2 of it is 0
    assert_identical(a.merged(b), a)
    assert_identical(b.merged(a), a)


def test_merge_is_the_state_of_the_union():
    """By the definition, in float64: sums weighted by exp2(score), relative to the larger of the two scores."""
    a = State.random(0, empty=0.3)
    b = State.random(100, empty=0.3).tied(a)  # a has the smaller columns, so that ties go to it
    merged = a.merged(b)
    largest = torch.maximum(a.sums[0], b.sums[0])
    assert torch.equal(merged.sums[0], largest)
    assert torch.equal(merged.column, torch.where(a.sums[0] >= b.sums[0], a.column, b.column))
    seen = largest.isfinite()
    parts = [s.sums[1:].double() * (s.sums[0].double() - largest).exp2().where(seen, 0.0) for s in (a, b)]
    terms = sum(part.abs() for part in parts)
    assert ((merged.sums[1:] - sum(parts)).abs() <= ROUNDING * terms).all()


def test_tanh_is_accurate_everywhere():
    """Seven roundings of 2^-24 in 1 - exp and its quotient where they cancel most, at 0.25: below 4e-7."""
    around_the_seam = torch.linspace(0.2, 0.3, 1024)
    wide = torch.linspace(0.0, 12.0, 2048)
    tiny = torch.logspace(-37, -1, 1024)
    x = torch.cat([around_the_seam, wide, tiny])
    x = torch.cat([x, -x])
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, SIZE=x.numel())
    exact = x.double().tanh()
    assert ((out.double() - exact).abs() <= 4e-7 * exact.abs()).all()
    assert torch.equal(out.sign(), x.sign())


def test_tanh_saturates():
    x = torch.tensor([1e10, -1e10, 3e38, -3e38, torch.inf, -torch.inf, 50.0, 0.0])
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, SIZE=x.numel())
    assert out.tolist() == [1, -1, 1, -1, 1, -1, 1, 0]
