"""Statistics over trials, against plain loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from locos_fast.scans.statistics import (
    active_share,
    agreement,
    best_heads,
    bootstrap,
    churn,
    gini,
    known_trials,
    shared_with,
    spearman,
    split_half,
    trials_that_say_anything,
    well_known,
)

TRIALS, LAYERS, HEADS = 9, 3, 4


@pytest.fixture
def scores() -> np.ndarray:
    """Scores of which one head is never there and one sometimes."""
    found = np.random.default_rng(0).normal(size=(TRIALS, LAYERS, HEADS)) + np.arange(HEADS)
    found[:, 1, 2] = np.nan
    found[:4, 2, 3] = np.nan
    return found


def ranks(values: list[float]) -> list[float]:
    """Rank of each value; equal ones share the mean of theirs."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def correlation(a: list[float], b: list[float]) -> float:
    x, y = (np.array(v) - sum(v) / len(v) for v in (a, b))
    return float((x * y).sum() / ((x * x).sum() * (y * y).sum()) ** 0.5)


def test_spearman_is_the_correlation_of_ranks_with_ties() -> None:
    a, b = [3.0, 1.0, 1.0, 2.0, 5.0, 3.0], [2.0, 2.0, 0.0, 7.0, 9.0, 1.0]
    assert spearman(np.array(a), np.array(b)) == pytest.approx(correlation(ranks(a), ranks(b)), rel=1e-12)


def test_an_interval_is_quantiles_of_means_of_resampled_trials(scores: np.ndarray) -> None:
    resamples = 100  # more than one block
    low, high = bootstrap(scores, seed=3, resamples=resamples)
    rng = np.random.default_rng(3)
    counts = np.concatenate([rng.multinomial(TRIALS, np.full(TRIALS, 1 / TRIALS), size=n) for n in (64, 36)])
    for layer, head in ((0, 0), (2, 3)):
        means = []
        for drawn in counts:
            values = [scores[t, layer, head] for t in range(TRIALS) for _ in range(drawn[t])]
            known = [v for v in values if not np.isnan(v)]
            means += [sum(known) / len(known)] if known else []
        assert (low[layer, head], high[layer, head]) == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-12)
    assert np.isnan(low[1, 2]) and np.isnan(high[1, 2])


@pytest.mark.parametrize("known", [1, 2, 3])
def test_a_head_known_in_too_few_trials_has_no_interval(scores: np.ndarray, known: int) -> None:
    scores[known:, 0, 0] = np.nan
    low, high = bootstrap(scores)
    assert np.isnan(low[0, 0]) == np.isnan(high[0, 0]) == (known < 3)
    assert np.isfinite(low[0, 1]) and np.isnan(bootstrap(scores[:1]).low).all()


def test_trials_of_one_context_are_drawn_together(scores: np.ndarray) -> None:
    repeated = np.repeat(scores, 4, axis=0)
    contexts = [f"context {number // 4}" for number in range(len(repeated))]
    together = bootstrap(repeated, contexts=contexts)
    for found, expected in zip(together, bootstrap(scores), strict=True):  # four times the same says nothing new
        np.testing.assert_allclose(found, expected, rtol=1e-12, equal_nan=True)
    apart = bootstrap(repeated)
    assert np.nanmax((apart.high - apart.low) / (together.high - together.low)) < 0.8  # expected: a half
    two = np.isnan(bootstrap(repeated[:8], contexts=contexts[:8]).low)
    assert two.all()  # eight trials, but only two contexts


def test_churn_is_one_minus_the_mean_overlap_of_best_heads(scores: np.ndarray) -> None:
    best = []
    for trial in scores:
        present = [
            (layer, head) for layer in range(LAYERS) for head in range(HEADS) if not np.isnan(trial[layer, head])
        ]
        best.append(set(sorted(present, key=lambda place: -trial[place])[:5]))
    overlaps = [len(a & b) / len(a | b) for a, b in combinations(best, 2)]
    assert churn(scores, 5) == pytest.approx(1 - sum(overlaps) / len(overlaps), rel=1e-12)


def test_a_head_is_active_where_it_has_a_tenth_of_the_largest_score(scores: np.ndarray) -> None:
    scores[0] = -np.abs(scores[0])  # a trial in which no head is
    found = active_share(scores)
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        active = [t for t in scores[1:] if t[layer, head] >= 0.1 * np.nanmax(t)]
        known = int((~np.isnan(scores[:, layer, head])).sum())
        assert found[layer, head] == pytest.approx(len(active) / known if known else np.nan, nan_ok=True)


def test_equal_trials_agree_entirely_and_unrelated_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    equal = np.repeat(rng.normal(size=(1, 10, 10)), 6, axis=0)
    assert split_half(equal) == pytest.approx(1) and churn(equal, 10) == 0
    unrelated = rng.normal(size=(6, 10, 10))
    assert abs(split_half(unrelated)) < 0.3 and churn(unrelated, 10) > 0.8  # expected: 0, and 1 - 5 % overlap


def test_gini_is_the_mean_difference_over_twice_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 4.0, 10.0]
    differences = [abs(a - b) for a in values for b in values]
    expected = sum(differences) / len(differences) / (2 * sum(values) / len(values))
    assert gini(np.array(values)) == pytest.approx(expected, rel=1e-12)


def test_one_trial_says_nothing_of_agreement(scores: np.ndarray) -> None:
    found = agreement(scores[:1])
    assert np.isnan(found.split_half) and np.isnan(found.churn) and 0 <= found.gini <= 1 and found.zero_share == 0


def test_churn_counts_trials_that_have_a_head_only(scores: np.ndarray) -> None:
    with_nothing = np.concatenate([scores, np.full((3, LAYERS, HEADS), np.nan)])
    assert churn(with_nothing, 5) == churn(scores, 5)
    assert np.isnan(churn(with_nothing[-4:], 5))  # one trial that has heads: no pair
    nothing = agreement(np.full((4, LAYERS, HEADS), np.nan))
    assert np.isnan(nothing.churn) and np.isnan(nothing.split_half) and np.isnan(nothing.zero_share)


def test_heads_at_zero_or_below_are_never_among_the_best() -> None:
    mean = np.array([[3.0, 0.0, -1.0], [np.nan, 2.0, 0.0]])
    other = np.array([[0.0, 5.0, 1.0], [np.nan, 4.0, 0.0]])
    assert best_heads(mean, 4) == [(0, 0), (1, 1)]
    assert shared_with({"score": mean, "other": other, "zero": 0 * mean}, "score", 4) == {
        "other": (1, 3),
        "zero": (0, 0),
    }


def test_a_head_known_in_half_of_the_trials_that_say_anything_is_well_known(scores: np.ndarray) -> None:
    assert known_trials(scores)[1, 2] == 0 and known_trials(scores)[2, 3] == TRIALS - 4
    assert not well_known(scores)[1, 2] and well_known(scores)[2, 3]
    scores[:5, 2, 3] = np.nan
    assert not well_known(scores)[2, 3]  # 4 of 9
    scores[8] = np.nan
    assert trials_that_say_anything(scores) == 8 and not well_known(scores)[2, 3]  # 3 of 8
