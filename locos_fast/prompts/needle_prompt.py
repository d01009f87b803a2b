"""Prompts composed in token space: a haystack, needles at given depths, a question, the beginning of the reply.

    [chat prefix] [template] context with needles [template with the question] [prompt suffix] [chat suffix] lead

A fact's template says what stands around its context; without one that is a blank line and the question. Every piece is
tokenised once and its ids are put one behind the other, so that a needle's tokens are known exactly and contexts that
begin alike begin with the same ids.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from locos_fast.prompts.answer_words import as_a_word
from locos_fast.prompts.chat_template import around_message
from locos_fast.prompts.compose import TokenisedText, tokenise
from locos_fast.prompts.text_segments import SENTENCE_END
from locos_fast.prompts.trials import Trial

IN_FRONT = "one"  # of a piece while it is tokenised: no vocabulary joins it with a space or a newline
IN_FRONT_OF_WORDS = f"{IN_FRONT}\n"  # of a piece that begins without white space
CHARACTERS_IN_FRONT = 200  # of an answer while it is tokenised
CONTEXT, QUESTION = "{haystack}", "{question}"  # in a template
TEMPLATE = f"{CONTEXT}\n\n{QUESTION}"  # of a fact that brings none


class Fact(NamedTuple):
    """What is hidden and asked for."""

    id: str
    needle: str  # a sentence
    question: str
    answer: str
    lead: str = ""  # with which the reply is begun
    group: str = ""  # facts of one kind
    about: str = ""  # whom; facts about the same one are not hidden together
    template: str = TEMPLATE  # the user's message; {haystack} and {question} stand in it once each
    haystack: str = ""  # which of its data set's own texts hides it; none: the text that a scan is given
    evidence: str = ""  # the part of the needle that is scored; none: all of it
    foil: str = ""  # a wrong answer of the same type, for where no other fact gives one

    @property
    def literal(self) -> bool:
        """Whether the needle says the answer as a word of its own, in capitals or not."""
        return as_a_word(self.answer, self.needle) is not None


class Piece(NamedTuple):
    """Token ids of a part of a prompt, and where in them stands what is looked for, half-open."""

    ids: list[int]
    span: tuple[int, int]


class Frame(NamedTuple):
    """What stands around a context, and where in it the question is asked."""

    opening: list[int]
    closing: list[int]
    question: tuple[int, int]  # tokens of `opening` if asked first, else of `closing`
    asked_first: bool
    lead_tokens: int
    closing_text: str


@dataclass(frozen=True)
class Haystack:
    """A text as tokens, and where its sentences end.

    text        the text, behind what it was tokenised behind
    ids         token ids, no special tokens
    offsets     half-open (start, end) characters of each token
    boundaries  numbers of tokens after which a sentence has ended, increasing; the first is 0
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    boundaries: list[int]

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Haystack:
        """Sentence ends are found in the text and carried over to tokens by their characters, for any vocabulary."""
        text = f"{IN_FRONT} {text.strip()}"  # so that the first sentence, too, can follow another one
        tokens = tokenise(tokenizer, text)
        first = next((i for i, (_, end) in enumerate(tokens.offsets) if end > len(IN_FRONT)), len(tokens.ids))
        ids, offsets = tokens.ids[first:], tokens.offsets[first:]
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        boundaries, passed = [0], 0
        for number, (start, end) in enumerate(offsets):
            if start == end or passed == len(ends) or start < ends[passed]:
                continue
            while passed < len(ends) and start >= ends[passed]:
                passed += 1
            if number > boundaries[-1]:
                boundaries.append(number)
        return cls(text, ids, offsets, boundaries)

    def boundary(self, depth: float, budget: int) -> int:
        """The sentence boundary nearest to `depth` percent of the first `budget` tokens; 100 is their end."""
        if depth == 100:
            return budget
        target = budget * depth / 100
        return min((b for b in self.boundaries if b <= budget), key=lambda b: abs(b - target))

    def beginning(self, tokens: int) -> str:
        """The text of the first `tokens` tokens."""
        return self.text[len(IN_FRONT) : max((end for _, end in self.offsets[:tokens]), default=0)]


class Composer:
    """Composes trials for one tokenizer.

    chat_template: whether the question is asked as a chat, with thinking off. prompt_suffix: text that ends the user's
    message, behind question and template, as it is given.
    Raises ValueError if a chat is wanted and the tokenizer has no template for it, or if it has no character
    offsets.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool, prompt_suffix: str = "") -> None:
        self.tokenizer = tokenizer
        self.before, self.after = around_message(tokenizer) if chat_template else ("", "")
        self.prompt_suffix = prompt_suffix

    def compose(
        self,
        haystack: Haystack,
        facts: Sequence[Fact],
        depths: Sequence[float],
        *,
        length: int,
        asked: int = 0,
        foil: str | None = None,
        trial_id: str,
    ) -> Trial:
        """A trial of at most `length` tokens, and as many as the question leaves, that asks for `facts[asked]`.

        Every fact's needle is hidden at the sentence boundary nearest to its depth, in percent of the context; where
        two meet, the first stands first. foil: a wrong answer of the same type.
        Raises ValueError if the haystack is too short, the needles and the question alone are longer than `length`, or
        the template is none.
        """
        fact = facts[asked]
        needles = [self._needle(hidden) for hidden in facts]
        frame = self.frame(fact)
        closing = max(len(self.frame(hidden).closing) for hidden in facts)  # one context, whichever is asked for
        budget = length - len(frame.opening) - closing - sum(len(needle.ids) for needle in needles)
        if budget < 1:
            raise ValueError(
                f"length: {length} tokens are too few: needle and question of {fact.id!r} alone take {length - budget}"
            )
        if budget > len(haystack.ids):
            raise ValueError(
                f"haystack: its {len(haystack.ids)} tokens are too few for prompts of {length}, which need {budget}"
            )
        places = [haystack.boundary(depth, budget) for depth in depths]
        context, spans = _hidden(haystack.ids[:budget], needles, places)
        before_context, before_closing = len(frame.opening), len(frame.opening) + len(context)
        prompt = frame.opening + context + frame.closing
        return Trial(
            prompt_ids=prompt,
            needle_span=_moved(spans[asked], before_context),
            answer_ids=self._answer(fact.answer, frame.closing_text),
            question=fact.question,
            needle=fact.evidence or fact.needle,
            answer=fact.answer,
            depth=100 * places[asked] / budget,
            length=len(prompt),
            id=trial_id,
            requested_depth=depths[asked],
            requested_length=length,
            question_span=frame.question if frame.asked_first else _moved(frame.question, before_closing),
            lead_tokens=frame.lead_tokens,
            foil=foil,
            foil_ids=None if foil is None else self._answer(foil, frame.closing_text),
        )

    def frame(self, fact: Fact) -> Frame:
        """What stands around the context when a fact is asked for, with exactly one BOS if the tokenizer puts one.
        Without a chat template the reply begins on a line of its own."""
        front, back = cut_template(fact.template)
        asked_first = QUESTION in front
        newline = "\n" if fact.lead and not self.after else ""
        opening_text = self.before + front.replace(QUESTION, fact.question)
        closing_text = back.replace(QUESTION, fact.question) + self.prompt_suffix + self.after + newline + fact.lead
        opening = self._opening(opening_text)
        behind = IN_FRONT if closing_text[:1].isspace() else IN_FRONT_OF_WORDS
        closing = self._behind(closing_text, behind) if closing_text else TokenisedText([], [], 0)
        first = len(self.before) + front.index(QUESTION) if asked_first else back.index(QUESTION)
        lead = _covering(closing, len(closing_text) - len(fact.lead), len(closing_text)) if fact.lead else (0, 0)
        return Frame(
            opening=opening.ids,
            closing=closing.ids,
            question=_covering(opening if asked_first else closing, first, first + len(fact.question)),
            asked_first=asked_first,
            lead_tokens=lead[1] - lead[0],
            closing_text=closing_text,
        )

    def _needle(self, fact: Fact) -> Piece:
        """Token ids of a needle behind a sentence, and where in them its evidence stands."""
        text = f" {fact.needle}"
        tokens = self._behind(text, IN_FRONT)
        if not fact.evidence:
            return Piece(tokens.ids, (0, len(tokens.ids)))
        start = text.index(fact.evidence)
        return Piece(tokens.ids, _covering(tokens, start, start + len(fact.evidence)))

    def _opening(self, text: str) -> TokenisedText:
        """What precedes the context, with exactly one BOS if the tokenizer puts one."""
        if text.strip():
            return tokenise(self.tokenizer, text)
        some = tokenise(self.tokenizer, IN_FRONT)
        return TokenisedText(some.ids[: some.leading], some.offsets[: some.leading], some.leading)

    def _answer(self, answer: str, closing: str) -> list[int]:
        """Token ids of an answer behind the end of the prompt."""
        space = "" if closing[-1:].isspace() else " "
        return self._behind(space + answer, closing[-CHARACTERS_IN_FRONT:]).ids

    def _behind(self, text: str, behind: str) -> TokenisedText:
        """Tokens of a text as it is tokenised behind another one. Raises ValueError if it has none."""
        tokens = tokenise(self.tokenizer, behind + text)
        skipped = len(behind)
        kept = [
            (token, (max(start - skipped, 0), end - skipped))
            for token, (start, end) in zip(tokens.ids, tokens.offsets, strict=True)
            if end > skipped
        ]
        if not kept:
            raise ValueError(f"tokenizer: it gives no tokens to {text.strip()!r}")
        return TokenisedText([token for token, _ in kept], [offsets for _, offsets in kept], 0)


def cut_template(template: str) -> tuple[str, str]:
    """What stands in front of the context and behind it.

    Raises ValueError for a text in which {haystack} and {question} do not stand once each.
    """
    if template.count(CONTEXT) != 1 or template.count(QUESTION) != 1:
        raise ValueError(f"template: expected {CONTEXT} and {QUESTION} once each, got {template[:80]!r}")
    front, _, back = template.partition(CONTEXT)
    return front, back


def _hidden(ids: list[int], needles: Sequence[Piece], places: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """A context with needles put in at the given places, and where the evidence of each then stands."""
    context: list[int] = []
    spans, done = [(0, 0)] * len(needles), 0
    for i in sorted(range(len(needles)), key=places.__getitem__):
        context += ids[done : places[i]]
        spans[i] = _moved(needles[i].span, len(context))
        context += needles[i].ids
        done = places[i]
    return context + ids[done:], spans


def _covering(tokens: TokenisedText, start: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters from `start` to `end`."""
    ends = [stop for _, stop in tokens.offsets]
    return bisect_right(ends, start), min(bisect_left(ends, end) + 1, len(ends))


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by
