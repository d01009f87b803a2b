"""Whether a set of heads beats its null: its rank among the draws, with the exact permutation p-value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

Extreme = Literal["low", "high"]


class AgainstNull(NamedTuple):
    """A value beside the values of null draws."""

    value: float
    draws: int
    percentile: float  # 0 to 100: the share of draws below the value, equal ones counted half
    p_value: float  # (draws at least as extreme + 1) / (draws + 1)
    resolution: float  # 1 / (draws + 1): the smallest p-value that this many draws can give

    def __str__(self) -> str:
        return (
            f"percentile {self.percentile:.3g} of {self.draws} draws, p = {self.p_value:.3g} "
            f"(resolution {self.resolution:.3g})"
        )


def against_null(value: float, null: Iterable[float], *, extreme: Extreme = "low") -> AgainstNull:
    """Where `value` stands among the values of null draws.

    extreme: which values speak against the null, "low" for what an ablation leaves, "high" for what it costs.
    The p-value is that of a permutation test in which the value counts as one of the draws, so it is never 0.
    Raises ValueError for no draws, and for values that are no numbers.
    """
    if extreme not in get_args(Extreme):
        raise ValueError(f"extreme: expected one of {', '.join(get_args(Extreme))}, got {extreme!r}")
    values = [float(x) for x in null]
    if not values:
        raise ValueError("null: expected the value of at least one draw, got none")
    if not math.isfinite(value):
        raise ValueError(f"value: expected a finite number, got {value}")
    if wrong := [x for x in values if not math.isfinite(x)]:
        raise ValueError(f"null: expected finite numbers, got {wrong[0]}")
    below, equal = sum(x < value for x in values), sum(x == value for x in values)
    at_least = equal + (below if extreme == "low" else len(values) - below - equal)
    count = len(values)
    return AgainstNull(value, count, 100 * (below + equal / 2) / count, (at_least + 1) / (count + 1), 1 / (count + 1))
