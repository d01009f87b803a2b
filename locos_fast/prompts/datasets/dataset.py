"""What a scan has to know of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from locos_fast.prompts.needle_grid import given_away
from locos_fast.prompts.needle_prompt import Fact


@dataclass(frozen=True)
class Dataset:
    """Facts, and the texts that hide them.

    facts     in the order in which they are used; each names its text and brings its prompt's template
    texts     haystacks of the data set's own, by the names that facts give; without any, the scan is given one
    repeated  whether such a text is repeated until it is long enough
    said      whether an answer that the needle says must not stand in the haystack either
    curated   whether facts that the haystack gives away are left out; otherwise they are a mistake of the user's
    options   what else the facts depend on, for config.json
    """

    name: str
    facts: list[Fact]
    texts: Mapping[str, str] = field(default_factory=dict)
    repeated: bool = False
    said: bool = False
    curated: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def fit_for(self, haystacks: Mapping[str, str]) -> tuple[list[Fact], list[str]]:
        """The facts whose answers their haystacks do not give away, and the ids of the others.

        haystacks: by name, the part that is used. Raises ValueError if one of the user's own facts is among the others,
        or if none is left.
        """
        found = {f.id: word for f in self.facts if (word := given_away(f, haystacks[f.haystack], said=self.said))}
        kept = [fact for fact in self.facts if fact.id not in found]
        if found and (not self.curated or not kept):
            which, word = next(iter(found.items()))
            raise ValueError(
                f"haystack: it gives the answer of {which} away: {word!r}; choose another haystack or needle"
            )
        return kept, sorted(found)


def taking_turns(columns: Sequence[Sequence[Fact]]) -> list[Fact]:
    """The first facts of all columns, then their second ones, and so on, so that few facts are of all kinds."""
    longest = max(map(len, columns), default=0)
    return [column[row] for row in range(longest) for column in columns if row < len(column)]
