"""Controls for an ablation: as many other heads, drawn at random so that they share something with the given ones.

random            from all other heads of the model
layer-matched     as many from each layer; where a layer has too few others, the nearest layers fill up
kv-group-matched  as many heads of as many KV groups, the groups others than those of the given heads

Published sets of heads have been no better than layer-matched random ones: a set proves something by beating its draws.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel

from locos_fast.causal.model_shape import KVGroup, ModelShape, check_heads, model_shape
from locos_fast.scoring.head_scores import Head, check_count


class MatchedHeads(NamedTuple):
    """One draw of control heads."""

    heads: list[Head]  # in order of layer and head
    borrowed: int = 0  # how many of them are of a near layer, because their own had no other head left
    distance: int = 0  # the most layers between a borrowed head and the layer that it stands for


class Draws(NamedTuple):
    """Different draws of one null; how many heads are borrowed, and from which layers, is the same in all of them."""

    kind: str
    sets: list[list[Head]]  # as many as were asked for, or all there are
    possible: int  # how many different ones there are
    borrowed: int
    distance: int


class Null(Protocol):
    """The sets of heads that a control is drawn from."""

    possible: int

    def draw(self, rng: random.Random) -> MatchedHeads: ...


def random_heads(model: PreTrainedModel | ModelShape, heads: Iterable[Head], *, seed: int) -> MatchedHeads:
    """As many heads of the model as `heads` has, none of them in `heads`.

    Raises ValueError if the model has too few other heads.
    """
    shape = model_shape(model)
    return RandomNull(shape, check_heads(shape, heads)).draw(random.Random(seed))


def layer_matched(model: PreTrainedModel | ModelShape, heads: Iterable[Head], *, seed: int) -> MatchedHeads:
    """As many random heads from each layer as `heads` has there, none of them in `heads`; where a layer has too few
    others, the rest comes from the nearest layers that have some, of two equally near ones from the lower.

    Raises ValueError if the model has too few other heads altogether.
    """
    shape = model_shape(model)
    return LayerNull(shape, check_heads(shape, heads)).draw(random.Random(seed))


def kv_group_matched(model: PreTrainedModel | ModelShape, heads: Iterable[Head], *, seed: int) -> MatchedHeads:
    """As many heads of as many KV groups as `heads` has, the same numbers of heads per group, of whatever layer.

    No group is one of those that `heads` has a head in.
    Raises ValueError if the model has too few other groups that are large enough.
    """
    shape = model_shape(model)
    return KVGroupNull(shape, check_heads(shape, heads)).draw(random.Random(seed))


def draws(kind: str, model: PreTrainedModel | ModelShape, heads: Iterable[Head], count: int, seed: int = 0) -> Draws:
    """`count` different draws of a null, one of `NULLS`, or all of them where there are fewer.

    The first is the one that the null's own function gives for this seed, and fewer draws are the first of more.
    Raises ValueError for an unknown kind, a count below 1, and where not one draw exists.
    """
    if kind not in NULLS:
        raise ValueError(f"kind: expected one of {', '.join(NULLS)}, got {kind!r}")
    if check_count("count", count) < 1:
        raise ValueError("count: expected at least one draw, got 0")
    shape = model_shape(model)
    null = NULLS[kind](shape, check_heads(shape, heads))
    rng = random.Random(seed)
    drawn: dict[tuple[Head, ...], MatchedHeads] = {}
    while len(drawn) < min(count, null.possible):
        draw = null.draw(rng)
        drawn.setdefault(tuple(draw.heads), draw)
    first = next(iter(drawn.values()))
    return Draws(kind, [draw.heads for draw in drawn.values()], null.possible, first.borrowed, first.distance)


class RandomNull:
    """All sets of as many other heads."""

    def __init__(self, shape: ModelShape, heads: Sequence[Head]) -> None:
        self.others, self.count = _others(shape, heads), len(heads)
        self.possible = math.comb(len(self.others), self.count)

    def draw(self, rng: random.Random) -> MatchedHeads:
        return MatchedHeads(sorted(rng.sample(self.others, self.count)))


class LayerNull:
    """All sets of other heads with as many in each layer, or in the nearest ones."""

    def __init__(self, shape: ModelShape, heads: Sequence[Head]) -> None:
        self.others, self.layers = _others(shape, heads), sorted(layer for layer, _ in heads)
        there = Counter(layer for layer, _ in self.others)
        taken = Counter(layer for layer, _ in self.draw(random.Random(0)).heads)  # the same in every draw
        self.possible = math.prod(math.comb(there[layer], count) for layer, count in taken.items())

    def draw(self, rng: random.Random) -> MatchedHeads:
        others = list(self.others)
        rng.shuffle(others)
        chosen: list[Head] = []
        unmatched = []
        for layer in self.layers:
            own = next((head for head in others if head[0] == layer), None)
            if own is None:
                unmatched.append(layer)
            else:
                others.remove(own)
                chosen.append(own)
        distance = 0
        for layer in unmatched:
            near = min(others, key=lambda head: (abs(head[0] - layer), head[0]))
            others.remove(near)
            chosen.append(near)
            distance = max(distance, abs(near[0] - layer))
        return MatchedHeads(sorted(chosen), len(unmatched), distance)


class KVGroupNull:
    """All sets of heads of other KV groups with as many heads in as many groups."""

    def __init__(self, shape: ModelShape, heads: Sequence[Head]) -> None:
        given = Counter(map(shape.kv_group, heads))
        self.pattern = sorted(given.values(), reverse=True)
        self.groups: dict[KVGroup, list[Head]] = {}
        for head in shape.every_head():
            if (group := shape.kv_group(head)) not in given:
                self.groups.setdefault(group, []).append(head)
        for needed, count in enumerate(self.pattern, 1):
            if (there := sum(len(group) >= count for group in self.groups.values())) < needed:
                raise ValueError(
                    f"heads: they take {needed} KV groups with {count} or more heads in each, and the model has "
                    f"{there} other groups as large, too few to match"
                )
        sizes = Counter(len(group) for group in self.groups.values())
        self.possible = _ways(list(sizes.items()), Counter(self.pattern))

    def draw(self, rng: random.Random) -> MatchedHeads:
        """Groups first, those for the most heads before the others, so that no choice leaves too few for the rest."""
        free = list(self.groups)
        chosen: list[Head] = []
        for count in self.pattern:
            group = rng.choice([group for group in free if len(self.groups[group]) >= count])
            free.remove(group)
            chosen += rng.sample(self.groups[group], count)
        return MatchedHeads(sorted(chosen))


NULLS: dict[str, Callable[[ModelShape, Sequence[Head]], Null]] = {
    "random": RandomNull,
    "layer-matched": LayerNull,
    "kv-group-matched": KVGroupNull,
}


def _others(shape: ModelShape, heads: Sequence[Head]) -> list[Head]:
    """All other heads, at least as many. Raises ValueError if there are fewer."""
    wanted = set(heads)
    others = [head for head in shape.every_head() if head not in wanted]
    if len(others) < len(wanted):
        raise ValueError(f"heads: the model has {len(others)} other heads, too few to match {len(wanted)}")
    return others


def _ways(sizes: list[tuple[int, int]], pattern: Counter[int]) -> int:
    """In how many ways heads can be taken from KV groups.

    sizes: (heads in a group, how many groups of that size). pattern: heads taken from a group -> from how many groups.
    """
    if not sizes:
        return int(not pattern.total())
    (size, groups), *rest = sizes
    ways = 0
    for taken in _parts(pattern, groups, everything=not rest):
        arranged = math.factorial(groups) // math.factorial(groups - taken.total())
        arranged //= math.prod(map(math.factorial, taken.values()))
        of_heads = math.prod(math.comb(size, count) ** times for count, times in taken.items())
        ways += arranged * of_heads * _ways(rest, pattern - taken)
    return ways


def _parts(pattern: Counter[int], groups: int, *, everything: bool) -> list[Counter[int]]:
    """The parts of the pattern that `groups` groups can take; only the whole of it if nobody is there for the rest."""
    if everything:
        return [pattern] if pattern.total() <= groups else []
    parts: list[Counter[int]] = [Counter()]
    for count, times in pattern.items():
        parts = [part | Counter({count: n}) for part in parts for n in range(min(times, groups - part.total()) + 1)]
    return parts
