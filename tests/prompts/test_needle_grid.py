"""Facts over a grid of lengths and depths, and what gives an answer away."""

from __future__ import annotations

from collections import Counter

import pytest

from locos_fast.planted.vocabulary import build_tokenizer
from locos_fast.prompts.built_in_facts import BUILT_IN_FACTS, RELATIONS
from locos_fast.prompts.needle_grid import MOST, Grid, given_away, needle_trials, packed_trials, placed, spread
from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack

FACTS = [
    Fact(str(i), f"Louvre hosts {name} .", "who Louvre ANSWER", name) for i, name in enumerate("Ada Leo Olga".split())
]


def trials(limit: int, grid: Grid):
    tokenizer = build_tokenizer(max_length=1000)
    composer = Composer(tokenizer, chat_template=False)
    haystack = Haystack.of(tokenizer, "old road in the valley . " * 40)
    return needle_trials(composer, {"": haystack}, FACTS, grid, limit=limit, name="set")


def test_a_limit_takes_evenly_from_all_lengths_depths_and_facts() -> None:
    found = trials(12, Grid([60, 90], [0.0, 50.0, 100.0]))
    assert set(Counter((t.requested_length, t.requested_depth) for t in found).values()) == {2}
    assert set(Counter(t.answer for t in found).values()) == {4}
    assert len({t.id for t in found}) == 12


def test_a_limit_below_the_number_of_cells_still_reaches_every_length_and_depth() -> None:
    for limit in (4, 5, 10, 15):
        found = trials(limit, Grid([60, 75, 90, 105], [0.0, 25.0, 50.0, 75.0]))
        lengths, depths = Counter(t.requested_length for t in found), Counter(t.requested_depth for t in found)
        assert len(found) == limit
        assert len(lengths) == len(depths) == 4
        assert max(lengths.values()) - min(lengths.values()) <= 1


def test_without_a_limit_every_cell_asks_for_every_fact_once() -> None:
    found = trials(1000, Grid([60, 90], [0.0, 100.0]))
    assert len(found) == len({(t.requested_length, t.requested_depth, t.answer) for t in found}) == 12


def kinds_at(side: int, cells) -> dict[object, Counter]:
    """How many facts of each kind a length (side 0) or a depth (side 1) asks for."""
    counts: dict[object, Counter] = {}
    for cell, fact in cells:
        counts.setdefault(cell[side], Counter())[fact.group] += 1
    return counts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("lengths", "depths", "limit"), [(3, 3, 18), (3, 3, 54), (2, 6, 12), (1, 3, 18), (3, 4, 144), (4, 3, 150)]
)
def test_every_length_and_depth_asks_for_all_relations(lengths: int, depths: int, limit: int, seed: int) -> None:
    facts = BUILT_IN_FACTS["bridges"](0)
    grid = Grid.of(list(range(100, 100 + lengths)), depths)
    found = placed(facts, grid, limit, seed=seed)
    assert sorted(fact.id for _, fact in found) == sorted(fact.id for fact in facts[:limit])
    sizes = Counter(cell for cell, _ in found)
    assert len(sizes) == lengths * depths and max(sizes.values()) - min(sizes.values()) <= 1
    everywhere = Counter(fact.group for fact in facts[:limit])
    for side, parts in ((0, lengths), (1, depths)):
        for counts in kinds_at(side, found).values():
            assert all(abs(counts[group] - count / parts) < 2 for group, count in everywhere.items())


def test_facts_that_fall_evenly_are_taken_as_they_come() -> None:
    facts = BUILT_IN_FACTS["bridges"](0)
    for used, limit in ((facts, 96), (BUILT_IN_FACTS["numbers"](0), 96), (facts, 60)):
        grid = Grid.parse("400:1600:3", "4")
        expected = zip(spread(grid, limit, seed=0), (used * 3)[:limit], strict=True)
        assert placed(used, grid, limit, seed=0) == list(expected)


def test_dealt_facts_are_asked_for_once_in_a_cell_at_most() -> None:
    facts = [Fact(str(i), "", "", "", group="ab"[i >= 2]) for i in range(4)]
    for limit in range(1, 25):
        found = placed(facts, Grid([60, 90, 120], [0.0, 50.0]), limit, seed=1)
        assert len(found) == len({(cell, fact.id) for cell, fact in found}) == limit


def test_packed_relations_take_turns_at_every_depth() -> None:
    composer = Composer(build_tokenizer(max_length=1000), chat_template=False)
    haystack = Haystack.of(composer.tokenizer, "old road in the valley . " * 60)
    facts = BUILT_IN_FACTS["bridges"](0)
    found = packed_trials(composer, {"": haystack}, facts, [240], per_context=6, limit=36, name="set")
    groups = {fact.id: fact.group for fact in facts}
    at_depth = {(trial.requested_depth, groups[trial.id.split("/")[1]]) for trial in found}
    # six contexts, six relations; some facts stand in another's place, with which it cannot stand together
    assert min(Counter(depth for depth, _ in at_depth).values()) >= 5


def test_a_limit_without_a_context_of_each_length_is_refused() -> None:
    composer = Composer(build_tokenizer(max_length=1000), chat_template=False)
    haystack = Haystack.of(composer.tokenizer, "old road in the valley . " * 60)
    facts, given = BUILT_IN_FACTS["bridges"](0), {"per_context": 4, "name": "set"}
    with pytest.raises(ValueError, match=r"^limit: expected at least 8, the 4 needles of a context of each length"):
        packed_trials(composer, {"": haystack}, facts, [200, 240], limit=7, **given)
    found = packed_trials(composer, {"": haystack}, facts, [200, 240], limit=8, **given)
    assert Counter(trial.requested_length for trial in found) == {200: 4, 240: 4}


def test_packed_needles_share_a_context_and_never_answer_each_other() -> None:
    composer = Composer(build_tokenizer(max_length=1000), chat_template=False)
    haystack = Haystack.of(composer.tokenizer, "old road in the valley . " * 60)
    facts = BUILT_IN_FACTS["bridges"](0)
    found = packed_trials(composer, {"": haystack}, facts, [240], per_context=6, limit=30, name="set")
    assert len(found) == len({(*t.prompt_ids, *t.needle_span) for t in found}) == 30
    for first in range(0, 30, 6):
        together = found[first : first + 6]
        assert [t.requested_depth for t in together] == [0, 20, 40, 60, 80, 100]
        assert len({t.needle.split()[0] for t in together}) == 6  # six names
        for trial in together:
            assert not any(trial.answer in other.needle for other in together)


@pytest.mark.parametrize(
    ("lengths", "depths", "expected"),
    [
        ("400:1600:3", "3", Grid([400, 1000, 1600], [0, 50, 100])),
        ("300,200", "10,90", Grid([200, 300], [10, 90])),
        ("500:500:1", "1", Grid([500], [50])),
        ("500", "30%", Grid([500], [30])),
        ("500", "30,", Grid([500], [30])),
        ("500", "90%, 2.5%", Grid([500], [2.5, 90])),
    ],
)
def test_lengths_and_depths_are_read(lengths: str, depths: str, expected: Grid) -> None:
    assert Grid.parse(lengths, depths) == expected


@pytest.mark.parametrize("lengths", ["", "a", "400:100:3", "400:500", "0", "-5", "400:500:0", "1:2:1", "100:200:3:4"])
def test_other_lengths_are_refused(lengths: str) -> None:
    with pytest.raises(ValueError, match="lengths: "):
        Grid.parse(lengths, "3")


@pytest.mark.parametrize("depths", ["", "x", "0", "-1", "10,101", "nan,1", "2.5", ",", "%", "101%", "5%%"])
def test_other_depths_are_refused(depths: str) -> None:
    with pytest.raises(ValueError, match="depths: "):
        Grid.parse("100", depths)


def test_more_than_a_thousand_of_either_are_refused_before_they_are_made() -> None:
    assert len(Grid.parse("1:5000:1000", "1000").depths) == MOST
    for depths in (str(MOST + 1), "100000000", "9" * 5000, [0.0] * (MOST + 1)):
        with pytest.raises(ValueError, match=r"^depths: expected"):
            Grid.of("100", depths)
    for lengths in ("1:1000000000:100000000", list(range(1, MOST + 2)), "9" * 5000):
        with pytest.raises(ValueError, match=r"^lengths: expected"):
            Grid.of(lengths, 3)


@pytest.mark.parametrize(
    ("answer", "text", "word"),
    [
        ("Portugal", "They drank Portuguese wine.", "Portuguese"),
        ("Portugal", "portugal won.", "portugal"),
        ("Rome", "Romeo was no Roman, Jerome neither.", None),
        ("Rome", "All roads lead to Rome.", "Rome"),
        ("Peru", "Peruse it.", None),
    ],
)
def test_an_answer_or_its_stem_in_the_haystack_gives_it_away(answer: str, text: str, word: str | None) -> None:
    assert given_away(Fact("x", "Laura lives there.", "Where?", answer), text) == word


def test_a_literal_answer_is_given_by_its_own_needle() -> None:
    assert given_away(Fact("x", "The number is 48213.", "Which?", "48213"), "48213") is None


@pytest.mark.parametrize("name", BUILT_IN_FACTS)
def test_built_in_facts_are_distinct_and_seeded(name: str) -> None:
    facts = BUILT_IN_FACTS[name](3)
    assert len({fact.id for fact in facts}) == len(facts) >= 20
    assert facts == BUILT_IN_FACTS[name](3) != BUILT_IN_FACTS[name](4)


def test_numbers_are_literal_and_bridges_are_not() -> None:
    assert all(fact.literal for fact in BUILT_IN_FACTS["numbers"](0))
    for fact in BUILT_IN_FACTS["bridges"](0):
        assert not fact.literal, fact
        assert given_away(fact, " ".join((fact.needle, fact.question, fact.lead))) is None, fact


def test_bridges_have_twenty_facts_of_each_relation_and_relations_take_turns() -> None:
    facts = BUILT_IN_FACTS["bridges"](0)
    assert min(Counter(fact.group for fact in facts).values()) >= 20
    assert len({fact.group for fact in facts[: len(RELATIONS)]}) == len(RELATIONS)
