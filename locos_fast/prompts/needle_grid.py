"""Which needle is hidden where: facts over a grid of prompt lengths and depths."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from locos_fast.prompts.answer_words import as_a_word, in_another_form
from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack
from locos_fast.prompts.trials import Trial

MOST = 1000  # lengths, and depths
DIGITS = 15  # of a number of them
Cell = tuple[int, float]  # length and depth


class Grid(NamedTuple):
    """Prompt lengths in tokens, and depths in percent of the context."""

    lengths: list[int]
    depths: list[float]

    @classmethod
    def of(cls, lengths: str | Sequence[int], depths: str | int | Sequence[float]) -> Grid:
        """Numbers, or what `parse` reads. Raises ValueError for all else, and for more than `MOST` of either."""
        return cls(
            _lengths(lengths if isinstance(lengths, str) else ",".join(map(str, lengths))),
            _depths(str(depths)) if isinstance(depths, str | int) else _percentages(depths, depths),
        )

    @classmethod
    def parse(cls, lengths: str, depths: str) -> Grid:
        """Read "A:B:N", N lengths from A to B, or lengths with commas between; a number of depths from 0 to 100, or
        percentages: 10,90 or 50%. Raises ValueError for all else, and for more than `MOST` of either."""
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

    A cell of the grid asks for a fact once at most, and every length and depth for facts of all kinds, see `placed`.
    haystacks: by the names that facts give. name: of the data set, for the trials' ids. seed: of the choice of cells
    where the limit is no multiple of their number.
    """
    return [
        composer.compose(
            haystacks[fact.haystack],
            [fact],
            [depth],
            length=length,
            foil=foil_of(fact, facts),
            trial_id=f"{name}/{fact.id}/{length}/{depth:g}",
        )
        for (length, depth), fact in placed(facts, grid, limit, seed=seed)
    ]


def placed(facts: Sequence[Fact], grid: Grid, limit: int, *, seed: int) -> list[tuple[Cell, Fact]]:
    """A cell for each of the first `limit` facts, which begin anew until every cell has asked for all of them.

    The cells take the facts as they come, in grid order; but where dealing them out kind by kind makes lengths and
    depths more alike in what they ask for, they are dealt. A kind is a group, or a fact without one.
    """
    count = min(limit, len(grid.lengths) * len(grid.depths) * len(facts))
    used = [facts[turn % len(facts)] for turn in range(count)]
    first = {kind: turn for turn, kind in reversed(list(enumerate(map(_kind, used))))}
    order = _stratified(grid, seed)
    as_they_come = list(zip(spread(grid, count, seed=seed), used, strict=True))
    by_kind = sorted(range(count), key=lambda turn: (first[_kind(used[turn])], turn % len(facts)))
    dealt = [(order[place % len(order)], used[turn]) for place, turn in enumerate(by_kind)]
    chosen = min(as_they_come, dealt, key=_meetings)
    return sorted(chosen, key=lambda each: each[0])


def _kind(fact: Fact) -> str:
    return fact.group or fact.id


def _meetings(cells: Sequence[tuple[Cell, Fact]]) -> int:
    """How often two facts of a kind meet at a length, or at a depth; least where the kinds are spread evenly."""
    counts = Counter((side, cell[side], _kind(fact)) for cell, fact in cells for side in (0, 1))
    return sum(count * (count - 1) // 2 for count in counts.values())


def spread(grid: Grid, count: int, *, seed: int) -> Iterator[Cell]:
    """A cell for each of `count` trials, in grid order; each cell as often as every other, but for one."""
    cells = list(product(grid.lengths, grid.depths))
    each, more = divmod(count, len(cells))
    favoured = set(_stratified(grid, seed)[:more])
    for cell in cells:
        yield from [cell] * (each + (cell in favoured))


def _stratified(grid: Grid, seed: int) -> list[Cell]:
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
    Raises ValueError if the facts do not give that many that can stand together, or `limit` leaves a length without a
    context.
    """
    least = per_context * len(lengths)
    if limit < least:
        raise ValueError(
            f"limit: expected at least {least}, the {per_context} needles of a context of each length, got {limit}"
        )
    depths = [100 * i / (per_context - 1) for i in range(per_context)]
    contexts = list(product(range(0, len(facts), per_context), lengths))[: limit // per_context]
    together = [_together([*facts[first:], *facts[:first]], per_context) for first, _ in contexts]
    trials = []
    for (_, length), hidden in zip(contexts, _over_depths(together), strict=True):
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


def _over_depths(contexts: Sequence[list[Fact]]) -> Sequence[list[Fact]]:
    """The needles of every context in the order of their depths: as they come, or each context's turned by one more
    place than the last one's if the depths are then more alike in the kinds of their facts."""
    turned = [facts[turn % len(facts) :] + facts[: turn % len(facts)] for turn, facts in enumerate(contexts)]
    return min(
        contexts, turned, key=lambda order: _meetings([((0, i), f) for facts in order for i, f in enumerate(facts)])
    )


def foil_of(fact: Fact, others: Sequence[Fact]) -> str | None:
    """A wrong answer of the same type: that of the first fact behind this one, and then from the beginning on, that is
    of its group and has another answer; the fact's own foil where there is none, or no group."""
    place = next((i for i, other in enumerate(others) if other.id == fact.id), 0)
    turned = [*others[place + 1 :], *others[:place]]
    found = (o.answer for o in turned if o.group == fact.group != "" and o.answer != fact.answer)
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
        return as_a_word(fact.answer, text, any_case=False) if said else None
    return as_a_word(fact.answer, text) or in_another_form(fact.answer, text)


def without_repeats(trials: Sequence[Trial]) -> tuple[list[Trial], list[str]]:
    """The trials without those that ask for the same answer behind the same prompt as one before them, as where two
    depths meet at one sentence boundary; and a sentence that says so if there are any."""
    kept: dict[Hashable, Trial] = {}
    for trial in trials:
        kept.setdefault((tuple(trial.prompt_ids), trial.needle_span, tuple(trial.answer_ids)), trial)
    repeats = len(trials) - len(kept)
    note = f"{repeats} of {len(trials)} trials are left out: they ask the same of the same prompt as others"
    return list(kept.values()), [note] if repeats else []


def unreached(trials: Sequence[Trial], grid: Grid) -> list[str]:
    """A sentence for lengths, and one for depths, that a limit leaves without a trial."""
    lengths = {trial.requested_length or trial.length for trial in trials}
    depths = {trial.depth if trial.requested_depth is None else trial.requested_depth for trial in trials}
    missing = {
        "lengths": [str(length) for length in grid.lengths if length not in lengths],
        "depths": [f"{depth:g}%" for depth in grid.depths if depth not in depths],
    }
    return [f"{name} without a trial: {', '.join(some)}; raise the limit" for name, some in missing.items() if some]


def _lengths(given: str) -> list[int]:
    parts = given.split(":" if ":" in given else ",")
    if not all(map(_is_count, parts)) or (":" in given and len(parts) != 3):
        raise ValueError(f"lengths: expected A:B:N or tokens with commas between, got {given!r}")
    numbers = [int(part) for part in parts]
    if ":" in given:
        first, last, count = numbers
        if not (first <= last and count >= 1) or (count == 1 and first != last):
            raise ValueError(f"lengths: expected A:B:N, N lengths from A up to B, got {given!r}")
        _check_few("lengths", count)
        numbers = [round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)]
    if min(numbers) < 1:
        raise ValueError(f"lengths: expected at least 1 token, got {given!r}")
    _check_few("lengths", len(numbers))
    return sorted(set(numbers))


def _depths(given: str) -> list[float]:
    parts = given.removesuffix(",").split(",")
    if "," in given or "%" in given:
        return _percentages([part.strip().removesuffix("%") for part in parts], given)
    if not _is_count(given) or int(given) < 1:
        raise ValueError(f"depths: expected how many, or percentages such as 10,90 or 50%, got {given!r}")
    _check_few("depths", count := int(given))
    return [50.0] if count == 1 else [100 * i / (count - 1) for i in range(count)]


def _percentages(parts: Sequence[str] | Sequence[float], given: object) -> list[float]:
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= depth <= 100 for depth in numbers):
        raise ValueError(f"depths: expected percentages from 0 to 100 with commas between, got {given!r}")
    _check_few("depths", len(numbers))
    return sorted(set(numbers))


def _is_count(part: str) -> bool:
    return part.strip().isdecimal() and len(part) <= DIGITS


def _check_few(name: str, count: int) -> None:
    if count > MOST:
        raise ValueError(f"{name}: expected at most {MOST}, got {count}")
