"""What the demonstration hides in the essays: a number for a name (literal), a city for a name whose country is asked
(non-literal)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from locos_fast.prompts.built_in_facts import COUNTRY_OF_CITY, NAMES


class Needle(NamedTuple):
    """A sentence to hide, what is asked about it, how the reply begins, and how it goes on."""

    sentence: str
    question: str
    lead: str
    answer: str
    giveaways: tuple[str, ...]  # words that must not stand anywhere else in the context


def literal_needles(seed: int) -> Iterator[Needle]:
    """A five-digit number for each name, in an order of their own for each seed."""
    rng = random.Random(seed)
    for name in rng.sample(NAMES, len(NAMES)):
        number = str(rng.randint(10_000, 99_999))
        about = f"The special magic number for {name} is"
        question = f"What is the special magic number for {name}?"
        yield Needle(f"{about} {number}.", question, about, number, (name, number))


def non_literal_needles(seed: int) -> Iterator[Needle]:
    """A city for each name, in an order of their own for each seed; the answer is the city's country."""
    rng = random.Random(seed)
    cities = rng.sample(sorted(COUNTRY_OF_CITY), len(COUNTRY_OF_CITY))
    for name, city in zip(rng.sample(NAMES, len(NAMES)), cities, strict=False):
        country = COUNTRY_OF_CITY[city]
        yield Needle(
            f"{name} lives in the city of {city}.",
            f"Which country does {name} live in?",
            f"{name} lives in the country of",
            country,
            (name, city, country),
        )
