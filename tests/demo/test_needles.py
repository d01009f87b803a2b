"""What is hidden in the essays can be answered from the needle and from nothing else."""

import itertools

import pytest

from locos_fast.demo.needles import literal_needles, non_literal_needles
from locos_fast.prompts.built_in_facts import COUNTRY_OF_CITY, NAMES


@pytest.mark.parametrize("needles", [literal_needles, non_literal_needles])
def test_each_seed_asks_about_each_name_once_and_in_an_order_of_its_own(needles):
    first, again, other = list(needles(0)), list(needles(0)), list(needles(1))
    assert first == again != other
    assert len({needle.sentence for needle in first}) == len(first) == len(NAMES)


def test_literal_answers_stand_in_the_needle_and_non_literal_ones_do_not():
    for literal, other in zip(literal_needles(0), non_literal_needles(0), strict=True):
        assert literal.answer in literal.sentence
        assert other.answer not in other.sentence


def test_names_cities_and_countries_are_not_part_of_each_other():
    words = {*NAMES, *COUNTRY_OF_CITY, *COUNTRY_OF_CITY.values()}
    assert not [(a, b) for a, b in itertools.permutations(words, 2) if a in b]
