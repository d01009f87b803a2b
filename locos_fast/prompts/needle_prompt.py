"""Prompts composed in token space: a haystack, needles at given depths, a question, the beginning of the reply.

    [chat prefix] context with needles [blank line] question [chat suffix] lead

Every piece is tokenised once and its ids are put one behind the other, so that a needle's tokens are known exactly and
contexts that begin alike begin with the same ids.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from locos_fast.prompts.compose import tokenise
from locos_fast.prompts.text_segments import SENTENCE_END
from locos_fast.prompts.trials import Trial

HERE = "<<<HERE>>>"  # stands for the user's message while a chat template is cut in two
IN_FRONT = "one"  # of a piece while it is tokenised: no vocabulary joins it with a space or a newline
CHARACTERS_IN_FRONT = 200  # of an answer while it is tokenised


class Fact(NamedTuple):
    """What is hidden and asked for."""

    id: str
    needle: str  # a sentence
    question: str
    answer: str
    lead: str = ""  # with which the reply is begun
    group: str = ""  # facts of one kind
    about: str = ""  # whom; facts about the same one are not hidden together

    @property
    def literal(self) -> bool:
        """Whether the needle says the answer."""
        return self.answer in self.needle


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

    chat_template: whether the question is asked as a chat, with thinking off. Raises ValueError if it is wanted and the
    tokenizer has none, and for a tokenizer without character offsets.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool) -> None:
        self.tokenizer = tokenizer
        self.before, self.after = _chat(tokenizer) if chat_template else ("", "")
        self.opening = self._opening()

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
        Raises ValueError if the haystack is too short or the needles and the question alone are longer than `length`.
        """
        fact = facts[asked]
        needles = [self._ids(f" {hidden.needle}", behind=IN_FRONT) for hidden in facts]
        closing_text = self._closing(fact)
        closing, question, lead_tokens = self._closing_ids(fact)
        budget = length - len(self.opening) - len(closing) - sum(map(len, needles))
        if budget < 1:
            raise ValueError(
                f"length: {length} tokens are too few: needle and question of {fact.id!r} alone take {length - budget}"
            )
        if budget > len(haystack.ids):
            raise ValueError(
                f"haystack: its {len(haystack.ids)} tokens are too few for prompts of {length}, which need {budget}"
            )
        places = [haystack.boundary(depth, budget) for depth in depths]
        prompt, done = list(self.opening), 0
        spans: dict[int, tuple[int, int]] = {}
        for i in sorted(range(len(facts)), key=places.__getitem__):
            prompt += haystack.ids[done : places[i]]
            spans[i] = (len(prompt), len(prompt) + len(needles[i]))
            prompt += needles[i]
            done = places[i]
        prompt += haystack.ids[done:budget]
        question_span = (len(prompt) + question[0], len(prompt) + question[1])
        prompt += closing
        return Trial(
            prompt_ids=prompt,
            needle_span=spans[asked],
            answer_ids=self._answer(fact.answer, closing_text),
            question=fact.question,
            needle=fact.needle,
            answer=fact.answer,
            depth=100 * places[asked] / budget,
            length=len(prompt),
            id=trial_id,
            requested_depth=depths[asked],
            requested_length=length,
            question_span=question_span,
            lead_tokens=lead_tokens,
            foil=foil,
            foil_ids=None if foil is None else self._answer(foil, closing_text),
        )

    def _closing(self, fact: Fact) -> str:
        """What follows the context. Without a chat template the reply begins on a line of its own."""
        newline = "\n" if fact.lead and not self.after else ""
        return f"\n\n{fact.question}{self.after}{newline}{fact.lead}"

    def _closing_ids(self, fact: Fact) -> tuple[list[int], tuple[int, int], int]:
        """Token ids of what follows the context, the span of the question in them, and how many begin the reply."""
        text = IN_FRONT + self._closing(fact)
        tokens = tokenise(self.tokenizer, text)
        kept = [(token, end) for token, (_, end) in zip(tokens.ids, tokens.offsets, strict=True) if end > len(IN_FRONT)]
        first = text.index(fact.question, len(IN_FRONT))
        ends = [end for _, end in kept]
        start = bisect_right(ends, first)
        stop = bisect_left(ends, first + len(fact.question)) + 1
        lead = len(ends) - bisect_right(ends, len(text) - len(fact.lead)) if fact.lead else 0
        return [token for token, _ in kept], (start, min(stop, len(ends))), lead

    def _answer(self, answer: str, closing: str) -> list[int]:
        """Token ids of an answer behind the end of the prompt."""
        space = "" if closing[-1:].isspace() else " "
        return self._ids(space + answer, behind=closing[-CHARACTERS_IN_FRONT:])

    def _opening(self) -> list[int]:
        """What precedes the context, with exactly one BOS if the tokenizer puts one."""
        if self.before:
            return tokenise(self.tokenizer, self.before).ids
        some = tokenise(self.tokenizer, IN_FRONT)
        return some.ids[: some.leading]

    def _ids(self, text: str, *, behind: str) -> list[int]:
        """Token ids of a text as it is tokenised behind another one. Raises ValueError if it has none."""
        tokens = tokenise(self.tokenizer, behind + text)
        ids = [token for token, (_, end) in zip(tokens.ids, tokens.offsets, strict=True) if end > len(behind)]
        if not ids:
            raise ValueError(f"tokenizer: it gives no tokens to {text.strip()!r}")
        return ids


def _chat(tokenizer: Any) -> tuple[str, str]:
    """What a chat template puts before and behind the user's message, up to where the reply begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat template: this tokenizer has none; --no-chat-template asks without one")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": HERE}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, found, after = whole.partition(HERE)
    if not found:
        raise ValueError("chat template: it does not keep the user's message as it is")
    return before, after
