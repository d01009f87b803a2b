"""Which needle is hidden where: facts over a grid of prompt lengths and depths."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack
from locos_fast.prompts.trials import Trial


class Grid(NamedTuple):
    """Prompt lengths in tokens, and depths in percent of the context."""

    lengths: list[int]
    depths: list[float]

    @classmethod
    def parse(cls, lengths: str, depths: str) -> Grid:
        """Read "A:B:N", N lengths from A to B, or lengths with commas between; a number of depths from 0 to 100, or
        depths with commas between. Raises ValueError for all else."""
        return cls(_lengths(lengths), _depths(depths))


def needle_trials(
    composer: Composer,
    haystack: Haystack,
    facts: Sequence[Fact],
    grid: Grid,
    *,
    limit: int,
    name: str,
    seed: int = 0,
) -> list[Trial]:
    """At most `limit` trials, spread evenly over lengths and depths, and over the facts in the order given.

    A cell of the grid asks for a fact once at most. name: of the data set, for the trials' ids. seed: of the choice of
    cells where the limit is no multiple of their number.
    """
    cells = list(product(grid.lengths, grid.depths))
    wanted = min(limit, len(cells) * len(facts))
    each, more = divmod(wanted, len(cells))
    favoured = set(_stratified(grid, seed)[:more])
    trials, turn = [], 0
    for length, depth in cells:
        for _ in range(each + ((length, depth) in favoured)):
            fact = facts[turn % len(facts)]
            trial_id = f"{name}/{fact.id}/{length}/{depth:g}"
            trials.append(
                composer.compose(haystack, [fact], [depth], length=length, foil=foil_of(fact, facts), trial_id=trial_id)
            )
            turn += 1
    return trials


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
    haystack: Haystack,
    facts: Sequence[Fact],
    lengths: Sequence[int],
    *,
    per_context: int,
    limit: int,
    name: str,
) -> list[Trial]:
    """At most `limit` trials, `per_context` to one context, in which all their needles are hidden, evenly spaced.

    A trial asks for one of the needles; the others are then distractors, so that these are other trials than single
    ones. Raises ValueError if the facts do not give that many that can stand together, or `limit` is smaller.
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
                    haystack,
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
    of its group and has another answer."""
    place = next((i for i, other in enumerate(others) if other.id == fact.id), 0)
    turned = [*others[place + 1 :], *others[:place]]
    return next((o.answer for o in turned if o.group == fact.group and o.answer != fact.answer), None)


def _together(facts: Sequence[Fact], count: int) -> list[Fact]:
    """The first `count` facts that do not answer each other's questions."""
    chosen: list[Fact] = []
    for fact in facts:
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


def given_away(fact: Fact, text: str) -> str | None:
    """What of the answer stands in the text, the answer itself or a word of the same stem, although the needle does
    not say it and it should have to be inferred; None if nothing does, or the needle says the answer."""
    if fact.literal:
        return None
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
    if "," not in given:
        if not given.strip().isdecimal() or int(given) < 1:
            raise ValueError(f"depths: expected how many, or percentages with commas between, got {given!r}")
        count = int(given)
        return [50.0] if count == 1 else [100 * i / (count - 1) for i in range(count)]
    try:
        numbers = [float(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= depth <= 100 for depth in numbers):
        raise ValueError(f"depths: expected percentages from 0 to 100 with commas between, got {given!r}")
    return sorted(set(numbers))
