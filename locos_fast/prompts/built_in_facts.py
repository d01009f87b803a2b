"""Facts that a scan can hide without any file: `numbers`, whose needles say the answer, and `bridges`, whose do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, cycle, zip_longest
from typing import NamedTuple

from locos_fast.prompts.needle_prompt import Fact

NAMES = (
    "Laura Oscar Nadia Felix Greta Marco Ingrid Hugo Selma Victor Clara Dmitri Amira Stefan Bianca Leon Yara Tobias "
    "Elena Rafael Judith Malik Sonja Erik Paula Andre Miriam Kasper Lucia Henrik Noemi Anton Carmen Jonas Helga Pavel"
).split()


def _pairs(text: str) -> dict[str, str]:
    return dict(tuple(side.strip() for side in pair.split(":")) for pair in text.split(","))  # type: ignore[misc]


COUNTRY_OF_CITY = _pairs("""
    Lisbon: Portugal, Madrid: Spain, Paris: France, Rome: Italy, Berlin: Germany, Vienna: Austria, Athens: Greece,
    Warsaw: Poland, Budapest: Hungary, Dublin: Ireland, Oslo: Norway, Stockholm: Sweden, Helsinki: Finland,
    Copenhagen: Denmark, Brussels: Belgium, Moscow: Russia, Istanbul: Turkey, Cairo: Egypt, Nairobi: Kenya,
    Lagos: Nigeria, Tehran: Iran, Baghdad: Iraq, Mumbai: India, Karachi: Pakistan, Bangkok: Thailand, Hanoi: Vietnam,
    Jakarta: Indonesia, Beijing: China, Tokyo: Japan, Sydney: Australia, Toronto: Canada, Lima: Peru, Santiago: Chile,
    Havana: Cuba, Barcelona: Spain, Munich: Germany, Milan: Italy, Osaka: Japan, Shanghai: China, Krakow: Poland
""")
CITY_OF_LANDMARK = _pairs("""
    the Colosseum: Rome, the Eiffel Tower: Paris, the Brandenburg Gate: Berlin, the Parthenon: Athens,
    the Kremlin: Moscow, Big Ben: London, the Statue of Liberty: New York, the Hagia Sophia: Istanbul,
    the Sagrada Familia: Barcelona, the Louvre: Paris, the Golden Gate Bridge: San Francisco,
    the Blue Mosque: Istanbul, the Burj Khalifa: Dubai, the Forbidden City: Beijing, the Trevi Fountain: Rome,
    Buckingham Palace: London, the Acropolis: Athens, the Prado Museum: Madrid, the White House: Washington,
    the Space Needle: Seattle, the Rijksmuseum: Amsterdam, the Spanish Steps: Rome, the Hollywood Sign: Los Angeles,
    the Charles Bridge: Prague
""")
CAPITAL_OF_COUNTRY = _pairs("""
    Portugal: Lisbon, Spain: Madrid, France: Paris, Italy: Rome, Germany: Berlin, Austria: Vienna, Greece: Athens,
    Poland: Warsaw, Hungary: Budapest, Ireland: Dublin, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki,
    Denmark: Copenhagen, Belgium: Brussels, Russia: Moscow, Egypt: Cairo, Kenya: Nairobi, Iran: Tehran, Iraq: Baghdad,
    Thailand: Bangkok, Japan: Tokyo, Peru: Lima, Cuba: Havana, Canada: Ottawa, Turkey: Ankara
""")
CONTINENT_OF_COUNTRY = _pairs("""
    Kenya: Africa, Nigeria: Africa, Egypt: Africa, Morocco: Africa, Ghana: Africa, Ethiopia: Africa, Uganda: Africa,
    Portugal: Europe, Poland: Europe, Norway: Europe, Greece: Europe, Hungary: Europe, Sweden: Europe, Spain: Europe,
    Thailand: Asia, Vietnam: Asia, Japan: Asia, Pakistan: Asia, Nepal: Asia, Malaysia: Asia, Indonesia: Asia
""")
STATE_OF_CITY = _pairs("""
    Boston: Massachusetts, Chicago: Illinois, Seattle: Washington, Atlanta: Georgia, Denver: Colorado, Phoenix: Arizona,
    Miami: Florida, Houston: Texas, Detroit: Michigan, Portland: Oregon, Nashville: Tennessee, Las Vegas: Nevada,
    Milwaukee: Wisconsin, Minneapolis: Minnesota, Baltimore: Maryland, Honolulu: Hawaii, Philadelphia: Pennsylvania,
    Cleveland: Ohio, New Orleans: Louisiana, Los Angeles: California, Salt Lake City: Utah
""")
COUNTRY_OF_CAPITAL = _pairs("""
    Lisbon: Portugal, Madrid: Spain, Paris: France, Rome: Italy, Berlin: Germany, Vienna: Austria, Athens: Greece,
    Warsaw: Poland, Dublin: Ireland, Oslo: Norway, Stockholm: Sweden, Cairo: Egypt, Nairobi: Kenya, Tokyo: Japan,
    Lima: Peru, Havana: Cuba, Bangkok: Thailand, Tehran: Iran, Ottawa: Canada, Canberra: Australia
""")


class Relation(NamedTuple):
    """How a pair (what the needle says, what follows from it) becomes a fact; {name} and {known} are filled in."""

    needle: str
    question: str
    lead: str
    answers: dict[str, str]

    def facts(self, group: str, rng: random.Random) -> Iterator[Fact]:
        names = cycle(rng.sample(NAMES, len(NAMES)))
        for (known, answer), name in zip(
            rng.sample(list(self.answers.items()), len(self.answers)), names, strict=False
        ):
            yield Fact(
                id=f"{group}-{known.removeprefix('the ').replace(' ', '-').lower()}",
                needle=self.needle.format(name=name, known=known),
                question=self.question.format(name=name),
                answer=answer,
                lead=self.lead.format(name=name),
                group=group,
                about=name,
            )


RELATIONS = {
    "city-country": Relation(
        "{name} lives in the city of {known}.",
        "In which country does {name} live?",
        "{name} lives in the country of",
        COUNTRY_OF_CITY,
    ),
    "landmark-city": Relation(
        "{name} lives near {known}.",
        "Near which city does {name} live?",
        "{name} lives near the city of",
        CITY_OF_LANDMARK,
    ),
    "country-capital": Relation(
        "{name} lives in the capital city of {known}.",
        "In which city does {name} live?",
        "{name} lives in the city of",
        CAPITAL_OF_COUNTRY,
    ),
    "capital-country": Relation(
        "{name} lives in the country whose capital is {known}.",
        "In which country does {name} live?",
        "{name} lives in the country of",
        COUNTRY_OF_CAPITAL,
    ),
    "country-continent": Relation(
        "{name} lives in the country of {known}.",
        "On which continent does {name} live?",
        "{name} lives on the continent of",
        CONTINENT_OF_COUNTRY,
    ),
    "city-state": Relation(
        "{name} lives in the American city of {known}.",
        "In which American state does {name} live?",
        "{name} lives in the American state of",
        STATE_OF_CITY,
    ),
}


def numbers(seed: int) -> list[Fact]:
    """A five-digit number for each of 36 names; the needle says it."""
    rng = random.Random(seed)
    facts = []
    for name in rng.sample(NAMES, len(NAMES)):
        lead, number = f"The special magic number for {name} is", str(rng.randint(10_000, 99_999))
        question = f"What is the special magic number for {name}?"
        facts.append(Fact(f"number-{name.lower()}", f"{lead} {number}.", question, number, lead, "number", name))
    return facts


def bridges(seed: int) -> list[Fact]:
    """Facts of six relations whose answer follows from the needle by common knowledge and does not stand in it; the
    relations take turns."""
    rng = random.Random(seed)
    columns = [list(relation.facts(group, rng)) for group, relation in RELATIONS.items()]
    return [fact for fact in chain.from_iterable(zip_longest(*columns)) if fact is not None]


BUILT_IN_FACTS: dict[str, Callable[[int], list[Fact]]] = {"numbers": numbers, "bridges": bridges}
