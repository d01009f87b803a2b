"""What the tests of score_tokens share: the answer that they score, and when two arrays of scores agree.

Tolerances are relative to the largest magnitude of an array. GOLDEN is the agreement that two float32 runs of the
recorded cases reach. Our own cases run in float64 against sums over positions, written out here; but transformers'
eager softmax and all norms work in float32 even then, and an error of 2^-24 grows tenfold on its way through three
layers (ROUNDING).
"""

from __future__ import annotations

import numpy as np

from locos_fast.scoring.head_scores import HeadScores

GOLDEN = 2e-5
ROUNDING = 2e-6


LENGTH = 27  # more than three windows of 8
ANSWER = [22, 24, 25]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude expected, and NaN in the same places."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    bound = tolerance * np.nanmax(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def described(scores: HeadScores) -> dict:
    """`meta` without what differs from run to run."""
    return {name: value for name, value in scores.meta.items() if name != "cost"}
