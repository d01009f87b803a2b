"""Percentile and permutation p-value of a set of heads among its null draws."""

import random
from fractions import Fraction
from itertools import combinations

import pytest

from locos_fast.causal.permutation import against_null


def test_a_value_below_all_draws_has_the_smallest_p_value_that_they_can_give():
    found = against_null(0.0, [0.5, 0.9, 1.0])
    assert (found.draws, found.percentile, found.p_value, found.resolution) == (3, 0.0, 0.25, 0.25)
    assert str(against_null(0.0, [1.0] * 19)) == "percentile 0 of 19 draws, p = 0.05 (resolution 0.05)"


def test_equal_draws_count_as_extreme_in_full_and_for_the_percentile_by_half():
    found = against_null(0.5, [0.2, 0.5, 0.5, 0.9])
    assert found.percentile == 50.0 and found.p_value == 4 / 5
    assert against_null(0.5, [0.5], extreme="high").p_value == 1.0


def test_high_values_are_extreme_where_the_caller_says_so():
    assert against_null(3.0, [1.0, 2.0, 4.0], extreme="high").p_value == 2 / 4
    assert against_null(3.0, [1.0, 2.0, 4.0]).p_value == 3 / 4


@pytest.mark.parametrize("extreme", ["low", "high"])
def test_under_the_null_the_p_value_is_at_most_x_with_probability_at_most_x(extreme):
    """Exactly, over which of the values is the target's: that is what makes it a p-value, ties or not."""
    rng = random.Random(0)
    for count in (1, 4, 19):
        values = [rng.randrange(8) for _ in range(count + 1)]
        others = combinations(range(count + 1), count)
        p_values = [
            against_null(
                values[({*range(count + 1)} - {*null}).pop()], [values[i] for i in null], extreme=extreme
            ).p_value
            for null in others
        ]
        for p in p_values:
            assert Fraction(sum(q <= p for q in p_values), count + 1) <= Fraction(p).limit_denominator(1000)


@pytest.mark.parametrize(
    "value, null, extreme, message",
    [
        (0.5, [], "low", "null: expected the value of at least one draw"),
        (float("nan"), [0.5], "low", "value: expected a finite number"),
        (0.5, [0.5, float("nan")], "low", "null: expected finite numbers"),
        (0.5, [0.5], "less", "extreme: expected one of low, high, got 'less'"),
    ],
)
def test_what_says_nothing_is_refused(value, null, extreme, message):
    with pytest.raises(ValueError, match=message):
        against_null(value, null, extreme=extreme)
