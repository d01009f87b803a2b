"""What a scan has to know of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from locos_fast.prompts.answer_words import as_a_word
from locos_fast.prompts.needle_grid import given_away
from locos_fast.prompts.needle_prompt import Fact


class Fit(NamedTuple):
    """What of a data set can be asked with its haystacks."""

    facts: list[Fact]
    left_out: list[str]  # ids
    notes: list[str]  # sentences about facts whose answers stand in the haystack


@dataclass(frozen=True)
class Dataset:
    """Facts, and the texts that hide them.

    facts     in the order in which they are used; each names its text and brings its prompt's template
    texts     haystacks of the data set's own, by the names that facts give; without any, the scan is given one
    repeated  whether such a text is repeated until it is long enough
    said      whether an answer that the needle says must not stand in the haystack either
    curated   whether facts that the haystack gives away are left out; otherwise the user is told
    options   what else the facts depend on, for config.json
    """

    name: str
    facts: list[Fact]
    texts: Mapping[str, str] = field(default_factory=dict)
    repeated: bool = False
    said: bool = False
    curated: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def fit_for(self, haystacks: Mapping[str, str]) -> Fit:
        """The facts whose answers their haystacks do not give away; of the user's own, those whose answers stand there
        in another form only are kept.

        haystacks: by name, the part that is used. Raises ValueError if the answer of one of the user's own facts stands
        in its haystack, or if no fact is left.
        """
        found = {f.id: word for f in self.facts if (word := given_away(f, haystacks[f.haystack], said=self.said))}
        if not found:
            return Fit(self.facts, [], [])
        kept = [fact for fact in self.facts if fact.id not in found]
        own = [] if self.curated else [f.id for f in self.facts if as_a_word(f.answer, haystacks[f.haystack])]
        refused = [which for which in found if which in own or (self.curated and not kept)]
        if refused:
            which = refused[0]
            raise ValueError(
                f"haystack: it gives the answer of {which} away: {found[which]!r}; choose another haystack or needle"
            )
        share = f"{len(found)} of {len(self.facts)} facts"
        if self.curated:
            return Fit(kept, sorted(found), [f"{share} are left out: their answers stand in the haystack"])
        which, word = next(iter(found.items()))
        return Fit(self.facts, [], [f"{share}: the haystack may give the answer away; that of {which} by {word!r}"])


def taking_turns(columns: Sequence[Sequence[Fact]]) -> list[Fact]:
    """The first facts of all columns, then their second ones, and so on, so that few facts are of all kinds."""
    longest = max(map(len, columns), default=0)
    return [column[row] for row in range(longest) for column in columns if row < len(column)]
