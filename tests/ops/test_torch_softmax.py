"""The softmax that runs over blocks of keys, alone, against the definition on all keys at once.

Tolerance in float64: a result is reached in fewer than 2^10 operations that each round to 2^-53 of the terms they add,
so two ways to compute it differ by at most 2^-43 of the sum of the absolute terms.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from locos_fast.ops.torch_softmax import LN_2, RunningLargest, RunningSoftmax, position_of_largest
from tests.oracles.threads import one_thread

ROWS = 40  # of which an eighth, 5, are few
SHARE = 2.0**-43
FIRST_SLOT = 1000


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def random_scores(n: int, *, hidden: float = 0.2, seed: int = 0) -> Tensor:
    """Scores (ROWS, n) in base 2, as wide as attention's, some of them hidden; in some rows all."""
    torch.manual_seed(seed)
    scores = 10 * torch.randn(ROWS, n, dtype=torch.float64)
    scores[torch.rand(ROWS) < hidden / 2] = -torch.inf
    return scores.masked_fill(torch.rand(ROWS, n) < hidden, -torch.inf)


def run(
    scores: Tensor, ends: list[int], values: Tensor | None = None, sinks: Tensor | None = None
) -> tuple[RunningSoftmax, Tensor]:
    """The softmax of blocks that end at `ends`, and the sum of values (n,) weighted along the way."""
    softmax = RunningSoftmax(scores[:, 0], sinks)
    total = torch.zeros(ROWS, dtype=torch.float64)
    for start, end in zip([0, *ends], [*ends, scores.shape[-1]], strict=True):
        if start < end:
            exponentials, keep = softmax.add(scores[:, start:end].clone(), FIRST_SLOT + start)
            block = exponentials.sum(-1) if values is None else exponentials @ values[start:end]
            total = total * keep + block
    return softmax, total


@given(st.integers(0, 10_000), st.integers(1, 200), st.data())
def test_any_cut_of_the_keys_gives_one_softmax(seed, n, data):
    scores = random_scores(n, seed=seed)
    values = torch.randn(n, dtype=torch.float64)
    ends = sorted(data.draw(st.lists(st.integers(0, n), max_size=8)))
    softmax, total = run(scores, ends, values)

    seen = scores.isfinite().any(-1)
    alpha = (scores * LN_2).softmax(-1).nan_to_num(0.0)  # a row that sees nothing
    lse = softmax.lse()
    assert torch.equal(lse == -torch.inf, ~seen)
    assert ((lse - (scores * LN_2).logsumexp(-1))[seen].abs() <= SHARE * (1 + lse[seen].abs())).all()
    slots = torch.where(seen, scores.argmax(-1) + FIRST_SLOT, -1)
    assert torch.equal(softmax.largest.argmax(), slots)
    to_alpha = softmax.to_alpha()
    # a score of up to 2^6 in base 2 turns its rounding into a relative error of the exponential
    assert ((total * to_alpha - alpha @ values).abs() <= 2**6 * SHARE * values.abs().max()).all()
    assert ((softmax.denominator * to_alpha - seen.double()).abs() <= SHARE).all()
    half = (n + 1) // 2
    earlier, _ = run(scores[:, :half], [])
    mass = earlier.denominator * softmax.to_alpha(reference=earlier.reference)
    assert ((mass - alpha[:, :half].sum(-1)).abs() <= 2**6 * SHARE).all()


def test_a_block_in_which_every_key_is_hidden_changes_nothing():
    scores = random_scores(20, hidden=0.0)
    with_hidden = torch.cat([scores[:, :10], torch.full((ROWS, 7), -torch.inf), scores[:, 10:]], -1).double()
    for ends, start in (([10, 17], 7), ([10, 12, 17], 7)):
        ours, theirs = run(with_hidden, ends)[0], run(scores, [10])[0]
        assert torch.equal(ours.denominator, theirs.denominator)
        assert torch.equal(ours.reference, theirs.reference)
        moved = theirs.largest.slot + start * (theirs.largest.slot >= FIRST_SLOT + 10)
        assert torch.equal(ours.largest.slot, moved)


def test_rows_are_independent():
    """One row sees only the first block, one only the second, one nothing."""
    scores = random_scores(20, hidden=0.0)
    scores[0, 10:] = scores[1, :10] = scores[2] = -torch.inf
    softmax, _ = run(scores, [10])
    for row, part in ((0, scores[0, :10]), (1, scores[1, 10:]), (3, scores[3])):
        exact = (part * LN_2).logsumexp(-1)
        assert (softmax.lse()[row] - exact).abs() <= SHARE * (1 + exact.abs())
    assert softmax.largest.slot[2] == -1
    assert softmax.denominator[2] == 0
    assert softmax.lse()[2] == -torch.inf
    assert softmax.to_alpha()[2] == 0


@pytest.mark.parametrize("gap", [1100.0, 1e30, 1e308])
def test_a_block_that_is_far_below_vanishes_without_overflow(gap):
    """exp2(-1076) is 0 in float64; the other way round, exp2(1030) would be infinite."""
    low, high = torch.full((ROWS, 3), -gap, dtype=torch.float64), torch.zeros(ROWS, 3, dtype=torch.float64)
    for scores, slot in ((torch.cat([low, high], -1), 3), (torch.cat([high, low], -1), 0)):
        softmax, total = run(scores, [3])
        assert torch.equal(softmax.denominator, torch.full_like(total, 3.0))
        assert torch.equal(total, torch.full_like(total, 3.0))
        assert torch.equal(softmax.largest.slot, torch.full((ROWS,), FIRST_SLOT + slot))


@pytest.mark.parametrize("better", [0, 1, 5, 6, ROWS])
@pytest.mark.parametrize("columns", [7, 64, 100])
def test_the_slot_is_found_however_many_rows_have_a_better_score(better, columns):
    """5 of 40 rows are few and looked at alone; beyond, all are; 64 columns are looked at in chunks."""
    largest = RunningLargest(torch.zeros(4, 2, 5), 0.0)
    largest.add(torch.full((4, 2, 5, 3), 2.0), 10)
    assert (largest.slot == 10).all()
    scores = torch.rand(ROWS, columns)
    rows = torch.randperm(ROWS)[:better]
    scores[rows, torch.randint(columns, (better,))] = 3.0
    largest.add(scores.view(4, 2, 5, columns), 100)
    expected = torch.full((ROWS,), 10)
    expected[rows] = 100 + scores[rows].argmax(-1)
    assert torch.equal(largest.slot.flatten(), expected)
    assert torch.equal(largest.score.flatten(), torch.where(expected >= 100, 3.0, 2.0))


def test_a_tie_keeps_the_first_slot():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]], dtype=torch.float64).repeat(ROWS, 1)
    for ends in ([], [1], [2], [1, 2, 3, 4], [3], [0, 0, 2]):
        assert run(scores, ends)[0].largest.slot.tolist() == [FIRST_SLOT + 1] * ROWS
    tied = torch.zeros(3, 96)
    tied[0, [40, 41, 70]] = tied[1, [31, 32]] = 1.0
    assert position_of_largest(tied).tolist() == [40, 31, 0]


def test_scores_that_do_not_exceed_the_lowest_have_no_slot():
    largest = RunningLargest(torch.zeros(2), 0.0)
    largest.add(torch.tensor([[0.0, 0.0], [0.0, 0.5]]), 0)
    assert largest.slot.tolist() == [-1, 1]


def test_a_nan_has_no_slot():
    largest = RunningLargest(torch.zeros(3), 0.0)
    largest.add(torch.tensor([[2.0, 1.0], [torch.nan, 1.0], [1.0, 2.0]]), 0)
    largest.add(torch.tensor([[1.0, torch.nan], [3.0, 1.0], [1.0, 3.0]]), 10)
    assert largest.argmax().tolist() == [-1, -1, 11]


def test_a_sink_enters_normaliser_and_weights_only():
    scores = random_scores(20)
    scores[1] = -torch.inf
    sinks = 30 * torch.randn(ROWS, dtype=torch.float64)
    softmax, _ = run(scores, [7], sinks=sinks)
    with_sinks = torch.cat([scores * LN_2, sinks[:, None]], -1)
    exact = with_sinks.logsumexp(-1)
    assert ((softmax.lse() - exact).abs() <= SHARE * (1 + exact.abs())).all()
    assert softmax.lse()[1] == sinks[1]
    seen = with_sinks.softmax(-1)[:, :-1].sum(-1)
    assert ((softmax.denominator * softmax.to_alpha() - seen).abs() <= 2**7 * SHARE).all()
