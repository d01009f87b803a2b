"""The algebra of partial softmax results: `merge` alone, in float64.

Tolerance: a result is reached in fewer than 2^10 operations that each round to 2^-53 of the terms they add, so two ways
to compute it differ by at most 2^-43 of the sum of the absolute terms.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locos_fast.softmax_state import LN_2, SoftmaxState, merge, normaliser, weight

ROWS, PAYLOAD = 3, 2
SHARE = 2.0**-43


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products here are small; threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state_of(scores: torch.Tensor, values: torch.Tensor, first_slot: int = 0) -> SoftmaxState:
    """The state of a set of keys by its definition; scores in base 2 (rows, n), values (n, payload)."""
    if not scores.isfinite().any():
        return SoftmaxState.empty(scores.shape[:-1], values.shape[-1], scores)
    largest, argmax = scores.max(-1)
    seen = largest > -torch.inf
    exponentials = (scores - torch.where(seen, largest, 0.0)[:, None]).exp2()
    slots = torch.where(seen, first_slot + argmax, -1)
    return SoftmaxState(largest, slots, exponentials.sum(-1), exponentials @ values)


def random_keys(n: int, *, hidden: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores as wide as attention's, some of them hidden, and values."""
    torch.manual_seed(seed)
    scores = 10 * torch.randn(ROWS, n, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(ROWS, n) < hidden, -torch.inf)
    return scores, torch.randn(n, PAYLOAD, dtype=torch.float64)


def cut(scores: torch.Tensor, values: torch.Tensor, ends: list[int]) -> list[SoftmaxState]:
    """The states of consecutive parts of the keys."""
    starts = [0, *ends]
    ends = [*ends, scores.shape[-1]]
    return [state_of(scores[:, a:b], values[a:b], a) for a, b in zip(starts, ends, strict=True)]


def assert_same(a: SoftmaxState, b: SoftmaxState, terms: float) -> None:
    """Equal up to the rounding of sums whose terms have absolute values that add up to `terms`."""
    assert torch.equal(a.largest, b.largest)
    assert torch.equal(a.argmax, b.argmax)
    for ours, theirs in ((a.denominator, b.denominator), (a.sums, b.sums)):
        assert ((ours - theirs).abs() <= SHARE * terms).all()  # False for NaN


def assert_identical(a: SoftmaxState, b: SoftmaxState) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(a, b, strict=True))


@given(st.integers(0, 10_000), st.integers(1, 200), st.data())
def test_any_cut_of_the_keys_gives_one_softmax(seed, n, data):
    scores, values = random_keys(n, seed=seed)
    ends = sorted(data.draw(st.lists(st.integers(0, n), max_size=8)))
    merged = functools.reduce(merge, cut(scores, values, ends))
    assert_same(merged, state_of(scores, values), terms=n * float(values.abs().max()) + n)

    seen = scores.isfinite().any(-1)
    alpha = (scores * LN_2).softmax(-1).nan_to_num(0.0)  # a row that sees nothing
    lse = normaliser(merged)
    assert torch.equal(lse == -torch.inf, ~seen)
    assert ((lse * LN_2 - (scores * LN_2).logsumexp(-1))[seen].abs() <= SHARE * (1 + lse[seen].abs())).all()
    averaged = merged.sums * weight(merged.largest, lse)[:, None]
    # exp2(largest - lse) turns the rounding of an lse of up to 2^6 into a relative error
    assert ((averaged - alpha @ values).abs() <= 2**6 * SHARE * values.abs().max()).all()


@given(st.integers(0, 10_000))
def test_merge_is_associative(seed):
    a, b, c = cut(*random_keys(90, seed=seed, hidden=0.5), ends=[1, 40])
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), terms=90 * 5)


def test_the_empty_state_is_neutral():
    state = state_of(*random_keys(20))
    empty = SoftmaxState.empty(torch.Size([ROWS]), PAYLOAD, state.sums)
    assert_identical(merge(empty, state), state)
    assert_identical(merge(state, empty), state)
    assert_identical(merge(empty, empty), empty)


def test_a_split_in_which_every_key_is_hidden_changes_nothing():
    scores, values = random_keys(30, hidden=0.0)
    scores[:, 10:20] = -torch.inf
    first, hidden, last = cut(scores, values, [10, 20])
    assert_identical(merge(merge(first, hidden), last), merge(first, last))
    assert_identical(merge(merge(hidden, first), last), merge(first, last))


def test_rows_are_independent():
    """One row sees only the first part, one only the second, one nothing."""
    scores, values = random_keys(20, hidden=0.0)
    scores[0, 10:] = scores[1, :10] = scores[2] = -torch.inf
    first, second = cut(scores, values, [10])
    merged = merge(first, second)
    for row, part in ((0, first), (1, second)):
        assert_identical(SoftmaxState(*(x[row] for x in merged)), SoftmaxState(*(x[row] for x in part)))
    assert merged.argmax[2] == -1
    assert merged.denominator[2] == 0
    assert normaliser(merged)[2] == -torch.inf
    assert weight(merged.largest, normaliser(merged))[2] == 0


@pytest.mark.parametrize("gap", [1100.0, 1e30])
def test_a_part_that_is_far_below_vanishes_without_overflow(gap):
    """exp2(-1076) is 0 in float64; the other way round, exp2(1030) would be infinite."""
    low, high = (
        SoftmaxState(torch.tensor([x]), torch.tensor([slot]), torch.ones(1), torch.ones(1, 1))
        for x, slot in ((-gap, 0), (0.0, 1))
    )
    assert_identical(merge(low, high), high)
    assert_identical(merge(high, low), high)


def test_a_tie_keeps_the_slot_of_the_first_part():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]], dtype=torch.float64)
    values = torch.zeros(5, 1, dtype=torch.float64)
    for ends in ([1], [2], [1, 2, 3, 4], [3], [0, 0, 2]):
        assert functools.reduce(merge, cut(scores, values, ends)).argmax.tolist() == [1]


def test_a_sink_enters_the_normaliser_only():
    scores, values = random_keys(20)
    state = state_of(scores, values)
    sinks = torch.tensor([0.5, -torch.inf, 40.0])
    with_sinks = torch.cat([scores, sinks.double()[:, None]], -1).mul(LN_2).logsumexp(-1) / LN_2
    assert ((normaliser(state, sinks) - with_sinks).abs() <= SHARE * (1 + with_sinks.abs())).all()
    empty = SoftmaxState.empty(torch.Size([3]), 0, state.sums)
    assert torch.equal(normaliser(empty, sinks), sinks.double())
    assert torch.equal(weight(empty.largest, normaliser(empty, sinks)), torch.zeros(3, dtype=torch.float64))
