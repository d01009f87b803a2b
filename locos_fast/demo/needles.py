"""What the demonstration hides in the essays: a number for a name (literal), a city for a name whose country is asked
(non-literal)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

NAMES = (
    "Laura Oscar Nadia Felix Greta Marco Ingrid Hugo Selma Victor Clara Dmitri Amira Stefan Bianca Leon Yara Tobias "
    "Elena Rafael Judith Malik Sonja Erik Paula Andre Miriam Kasper Lucia Henrik Noemi Anton Carmen Jonas Helga Pavel"
).split()

COUNTRY_OF = {
    "Lisbon": "Portugal",
    "Madrid": "Spain",
    "Paris": "France",
    "Rome": "Italy",
    "Berlin": "Germany",
    "Vienna": "Austria",
    "Athens": "Greece",
    "Warsaw": "Poland",
    "Budapest": "Hungary",
    "Dublin": "Ireland",
    "Oslo": "Norway",
    "Stockholm": "Sweden",
    "Helsinki": "Finland",
    "Copenhagen": "Denmark",
    "Brussels": "Belgium",
    "Moscow": "Russia",
    "Istanbul": "Turkey",
    "Cairo": "Egypt",
    "Nairobi": "Kenya",
    "Lagos": "Nigeria",
    "Tehran": "Iran",
    "Baghdad": "Iraq",
    "Mumbai": "India",
    "Karachi": "Pakistan",
    "Bangkok": "Thailand",
    "Hanoi": "Vietnam",
    "Jakarta": "Indonesia",
    "Beijing": "China",
    "Tokyo": "Japan",
    "Sydney": "Australia",
    "Toronto": "Canada",
    "Lima": "Peru",
    "Santiago": "Chile",
    "Havana": "Cuba",
    "Barcelona": "Spain",
    "Munich": "Germany",
    "Milan": "Italy",
    "Osaka": "Japan",
    "Shanghai": "China",
    "Krakow": "Poland",
}


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
    cities = rng.sample(sorted(COUNTRY_OF), len(COUNTRY_OF))
    for name, city in zip(rng.sample(NAMES, len(NAMES)), cities, strict=False):
        country = COUNTRY_OF[city]
        yield Needle(
            f"{name} lives in the city of {city}.",
            f"Which country does {name} live in?",
            f"{name} lives in the country of",
            country,
            (name, city, country),
        )
