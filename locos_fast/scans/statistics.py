"""What many trials say of every head: means, intervals, and how far the trials agree.

Everything is computed from the trials' own scores, so that resuming, merging or adding trials cannot give another
answer than one uninterrupted run. Arrays are (trials, layers, heads); NaN means that a trial says nothing of a head.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from locos_fast.scoring.head_scores import nan_mean

Array = NDArray[np.float64]

RESAMPLES = 1000
SPLITS = 100
ACTIVE_SHARE = 0.1  # of a trial's largest score, as in `HeadScores.found`
BLOCK = 64  # resamples at a time
LEAST_KNOWN = 3  # independent trials below which a head has no interval
WELL_KNOWN = 0.5  # share of the trials in which a head has to be known to be ranked with the others


class Interval(NamedTuple):
    """Percentile bootstrap over trials, (layers, heads) each; NaN for heads known in too few of them."""

    low: Array
    high: Array


class Agreement(NamedTuple):
    """How far trials agree on the heads."""

    split_half: float  # mean Spearman correlation of the means of two halves of the trials, -1 to 1
    churn: float  # 1 - mean Jaccard overlap of the k best heads of two trials that have any, 0 to 1
    top_k: int
    gini: float  # of the positive mean scores: 0, all heads alike, to 1, one head has everything
    zero_share: float  # share of heads whose mean score is exactly zero


class Shared(NamedTuple):
    """Of the best heads of a detector, how many another one has among its best."""

    shared: int
    of: int  # best heads that the detector has: fewer than asked for where fewer are positive


def bootstrap(
    scores: Array,
    *,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The interval of every head's mean over trials, by resampling trials with replacement.

    contexts: the context of each trial; trials of one context are drawn together, since what they share makes them
    alike. A head known in fewer than `LEAST_KNOWN` contexts has no interval.
    """
    place = _numbered(range(len(scores)) if contexts is None else contexts)
    drawable = int(place.max()) + 1
    rng = np.random.default_rng(seed)
    known = ~np.isnan(scores)
    values = _sums(np.where(known, scores, 0.0), place, drawable)
    counted = _sums(known.astype(np.float64), place, drawable)
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, BLOCK):
        stop = min(start + BLOCK, resamples)
        drawn = rng.multinomial(drawable, np.full(drawable, 1 / drawable), size=stop - start).astype(np.float64)
        count = drawn @ counted
        means[start:stop] = np.where(count > 0, drawn @ values / np.maximum(count, 1), np.nan)
    tail = (1 - confidence) / 2
    hardly = (counted > 0).sum(0) < LEAST_KNOWN
    means[:, hardly] = 0.0  # a quantile of nothing would warn
    low, high = np.nanquantile(means, [tail, 1 - tail], axis=0)
    low[hardly] = high[hardly] = np.nan
    return Interval(low.reshape(scores.shape[1:]), high.reshape(scores.shape[1:]))


def _numbered(contexts: Iterable[Hashable]) -> NDArray[np.int64]:
    """The number of each trial's context, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(context, len(numbers)) for context in contexts])


def _sums(values: Array, place: NDArray[np.int64], count: int) -> Array:
    """(contexts, layers * heads): what the trials of each context add up to."""
    found = np.zeros((count, values[0].size))
    np.add.at(found, place, values.reshape(len(values), -1))
    return found


def known_trials(scores: Array) -> NDArray[np.int64]:
    """(layers, heads): in how many trials a head has a score."""
    return (~np.isnan(scores)).sum(0)


def well_known(scores: Array) -> NDArray[np.bool_]:
    """(layers, heads): whether a head has a score in half of the trials that say anything; means over fewer are not
    ranked with those."""
    return known_trials(scores) >= max(WELL_KNOWN * trials_that_say_anything(scores), 1)


def trials_that_say_anything(scores: Array) -> int:
    """In how many trials any head has a score."""
    return int((~np.isnan(scores)).any((1, 2)).sum())


def agreement(scores: Array, *, top_k: int = 10, seed: int = 0) -> Agreement:
    """How far the trials agree; split_half and churn are NaN with fewer than two trials that have heads."""
    mean = nan_mean(scores)
    present = mean[~np.isnan(mean)]
    return Agreement(
        split_half=split_half(scores, seed=seed),
        churn=churn(scores, top_k),
        top_k=top_k,
        gini=gini(present[present > 0]),
        zero_share=float((present == 0).mean()) if len(present) else float("nan"),
    )


def split_half(scores: Array, *, seed: int = 0, splits: int = SPLITS) -> float:
    """Mean Spearman correlation, over random splits, between the head means of two halves of the trials."""
    trials = len(scores)
    if trials < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = rng.permutation(trials)
        a, b = (nan_mean(scores[half]).ravel() for half in (order[: trials // 2], order[trials // 2 :]))
        both = ~np.isnan(a) & ~np.isnan(b)
        if len(np.unique(a[both])) > 1 and len(np.unique(b[both])) > 1:
            found.append(spearman(a[both], b[both]))
    return float(np.mean(found)) if found else float("nan")


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two vectors, ties sharing their mean rank; neither may be constant."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def churn(scores: Array, top_k: int) -> float:
    """1 - the mean Jaccard overlap of the `top_k` best heads of every two trials that have any; NaN without two."""
    scores = scores[(~np.isnan(scores)).any((1, 2))]
    trials = len(scores)
    if trials < 2:
        return float("nan")
    flat = np.where(np.isnan(scores), -np.inf, scores).reshape(trials, -1)
    best = np.argsort(-flat, axis=1, kind="stable")[:, :top_k]
    chosen = np.zeros_like(flat)
    np.put_along_axis(chosen, best, 1.0, axis=1)
    chosen[np.isinf(flat)] = 0.0
    shared = chosen @ chosen.T
    size = chosen.sum(1)
    jaccard = shared / np.maximum(size[:, None] + size[None, :] - shared, 1)
    return float(1 - jaccard[np.triu_indices(trials, 1)].mean())


def shared_with(means: Mapping[str, Array], reference: str, top_k: int) -> dict[str, Shared]:
    """Of the `top_k` best heads by each other array, how many are among the best by `reference`."""
    best = {name: set(best_heads(mean, top_k)) for name, mean in means.items()}
    others = {name: heads for name, heads in best.items() if name != reference}
    return {name: Shared(len(heads & best[reference]), len(heads)) for name, heads in others.items()}


def best_heads(mean: Array, top_k: int) -> list[tuple[int, int]]:
    """(layer, head) of the best heads, best first: of those that are positive."""
    flat = np.where(np.isnan(mean), -np.inf, mean).ravel()
    order = np.argsort(-flat, kind="stable")[:top_k]
    return [divmod(int(place), mean.shape[1]) for place in order if flat[place] > 0]


def active_share(scores: Array, share: float = ACTIVE_SHARE) -> Array:
    """(layers, heads): in what share of the trials in which it is known a head has at least `share` of the trial's
    largest score; NaN where it is known in none."""
    trials = len(scores)
    largest = np.nanmax(np.where(np.isnan(scores), -np.inf, scores).reshape(trials, -1), axis=1)
    active = (scores >= share * largest[:, None, None]) & (largest > 0)[:, None, None]
    known = known_trials(scores)
    return np.where(known > 0, active.sum(0) / np.maximum(known, 1), np.nan)


def gini(values: Array) -> float:
    """Gini coefficient of non-negative values, 0 to 1; NaN without any."""
    ordered = np.sort(values)
    if len(ordered) == 0 or ordered.sum() == 0:
        return float("nan")
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))
