"""Which needle is hidden where: facts over a grid of prompt lengths and depths."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack
from locos_fast.prompts.trials import Trial


class Grid(NamedTuple):
    """Prompt lengths in tokens, and depths in percent of the context."""

    lengths: list[int]
    depths: list[float]

    @classmethod
    def of(cls, lengths: str | Sequence[int], depths: str | int | Sequence[float]) -> Grid:
        """Numbers, or what `parse` reads."""
        return cls(
            _lengths(lengths if isinstance(lengths, str) else ",".join(map(str, lengths))),
            _depths(str(depths)) if isinstance(depths, str | int) else _percentages(depths, depths),
        )

    @classmethod
    def parse(cls, lengths: str, depths: str) -> Grid:
        """Read "A:B:N", N lengths from A to B, or lengths with commas between; a number of depths from 0 to 100, or
        depths with commas between. Raises ValueError for all else."""
        return cls(_lengths(lengths), _depths(depths))


def needle_trials(
    composer: Composer,
    haystacks: Mapping[str, Haystack],
    facts: Sequence[Fact],
    grid: Grid,
    *,
    limit: int,
    name: str,
    seed: int = 0,
) -> list[Trial]:
    """At most `limit` trials, spread evenly over lengths and depths, and over the facts in the order given.

    A cell of the grid asks for a fact once at most. haystacks: by the names that facts give. name: of the data set, for
    the trials' ids. seed: of the choice of cells where the limit is no multiple of their number.
    """
    trials = []
    cells = len(grid.lengths) * len(grid.depths)
    for turn, (length, depth) in enumerate(spread(grid, min(limit, cells * len(facts)), seed=seed)):
        fact = facts[turn % len(facts)]
        trials.append(
            composer.compose(
                haystacks[fact.haystack],
                [fact],
                [depth],
                length=length,
                foil=foil_of(fact, facts),
                trial_id=f"{name}/{fact.id}/{length}/{depth:g}",
            )
        )
    return trials


def spread(grid: Grid, count: int, *, seed: int) -> Iterator[tuple[int, float]]:
    """A cell for each of `count` trials, length and depth, in order; each cell as often as every other, but for one."""
    cells = list(product(grid.lengths, grid.depths))
    each, more = divmod(count, len(cells))
    favoured = set(_stratified(grid, seed)[:more])
    for cell in cells:
        yield from [cell] * (each + (cell in favoured))


def _stratified(grid: Grid, seed: int) -> list[tuple[int, float]]:
    """All cells in an order of which every beginning is spread over the grid: in each round every length comes once, at
    another depth than the lengths around it."""
    rng = random.Random(seed)
    depths = rng.sample(grid.depths, len(grid.depths))
    return [
        (length, depths[(turn + number) % len(depths)])
        for turn in range(len(depths))
        for number, length in rng.sample(list(enumerate(grid.lengths)), len(grid.lengths))
    ]


def packed_trials(
    composer: Composer,
    haystacks: Mapping[str, Haystack],
    facts: Sequence[Fact],
    lengths: Sequence[int],
    *,
    per_context: int,
    limit: int,
    name: str,
) -> list[Trial]:
    """At most `limit` trials, `per_context` to one context, in which all their needles are hidden, evenly spaced.

    A trial asks for one of the needles; the others are then distractors, so that these are other trials than single
    ones; facts with haystacks of their own share a context only if it is the same one. haystacks, name: see
    `needle_trials`.
    Raises ValueError if the facts do not give that many that can stand together, or `limit` is smaller.
    """
    if limit < per_context:
        raise ValueError(f"limit: expected at least the {per_context} needles of one context, got {limit}")
    depths = [100 * i / (per_context - 1) for i in range(per_context)]
    contexts = list(product(range(0, len(facts), per_context), lengths))[: limit // per_context]
    trials = []
    for first, length in contexts:
        hidden = _together([*facts[first:], *facts[:first]], per_context)
        for asked, fact in enumerate(hidden):
            trial_id = f"{name}/{fact.id}/{length}/{depths[asked]:g}/packed"
            trials.append(
                composer.compose(
                    haystacks[fact.haystack],
                    hidden,
                    depths,
                    length=length,
                    asked=asked,
                    foil=foil_of(fact, [*hidden, *facts]),
                    trial_id=trial_id,
                )
            )
    return trials


def foil_of(fact: Fact, others: Sequence[Fact]) -> str | None:
    """A wrong answer of the same type: that of the first fact behind this one, and then from the beginning on, that is
    of its group and has another answer; the fact's own foil where there is none."""
    place = next((i for i, other in enumerate(others) if other.id == fact.id), 0)
    turned = [*others[place + 1 :], *others[:place]]
    found = (o.answer for o in turned if o.group == fact.group and o.answer != fact.answer)
    return next(found, fact.foil or None)


def _together(facts: Sequence[Fact], count: int) -> list[Fact]:
    """The first `count` facts that do not answer each other's questions and have one haystack."""
    chosen: list[Fact] = []
    for fact in (other for other in facts if other.haystack == facts[0].haystack):
        if len(chosen) < count and not any(_clash(fact, other) for other in chosen):
            chosen.append(fact)
    if len(chosen) < count:
        raise ValueError(f"needles-per-context: only {len(chosen)} of the facts can stand together, not {count}")
    return chosen


def _clash(one: Fact, other: Fact) -> bool:
    return (
        one.question == other.question
        or one.answer == other.answer
        or (one.about == other.about != "")
        or given_away(one, other.needle) is not None
        or given_away(other, one.needle) is not None
    )


def given_away(fact: Fact, text: str, *, said: bool = False) -> str | None:
    """What of the answer stands in the text, the answer itself or a word of the same stem, although the needle does
    not say it and it should have to be inferred; None if nothing does.

    Where the needle says the answer, nothing is given away, unless `said`: then the answer as a word of its own is.
    """
    if fact.literal:
        return fact.answer if said and re.search(rf"\b{re.escape(fact.answer)}\b", text) else None
    kept = len(fact.answer) - max(0, min(2, len(fact.answer) - 4))  # Portugal, Portuguese; Italy, Italian; Rome
    end = r"\w*" if kept < len(fact.answer) else r"\b"
    found = re.search(rf"\b{re.escape(fact.answer[:kept])}{end}", text, re.IGNORECASE)
    return found and found[0]


def _lengths(given: str) -> list[int]:
    parts = given.split(":" if ":" in given else ",")
    if not all(part.strip().isdecimal() for part in parts) or (":" in given and len(parts) != 3):
        raise ValueError(f"lengths: expected A:B:N or tokens with commas between, got {given!r}")
    numbers = [int(part) for part in parts]
    if ":" in given:
        first, last, count = numbers
        if not (first <= last and count >= 1) or (count == 1 and first != last):
            raise ValueError(f"lengths: expected A:B:N, N lengths from A up to B, got {given!r}")
        numbers = [round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)]
    if min(numbers) < 1:
        raise ValueError(f"lengths: expected at least 1 token, got {given!r}")
    return sorted(set(numbers))


def _depths(given: str) -> list[float]:
    if "," in given:
        return _percentages(given.split(","), given)
    if not given.strip().isdecimal() or int(given) < 1:
        raise ValueError(f"depths: expected how many, or percentages with commas between, got {given!r}")
    count = int(given)
    return [50.0] if count == 1 else [100 * i / (count - 1) for i in range(count)]


def _percentages(parts: Sequence[str] | Sequence[float], given: object) -> list[float]:
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= depth <= 100 for depth in numbers):
        raise ValueError(f"depths: expected percentages from 0 to 100 with commas between, got {given!r}")
    return sorted(set(numbers))
