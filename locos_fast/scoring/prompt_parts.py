"""Which rows of a prompt the detectors read: those of the answer, and those around them that some detectors want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from locos_fast.prompts.trials import Trial
from locos_fast.scoring.needle import Span

Detectors = Literal["published", "all"]
Places = slice | list[int]

ANCHORS = 8  # last tokens of the prompt from which HeadKV looks back


class PromptParts(NamedTuple):
    """What further detectors have to know of a prompt, in token indices; see `detectors.DETECTORS` for who needs what.

    prompt_tokens  tokens of the prompt; what follows is the reply
    question       (start, end), half-open, of the question
    lead_tokens    how many of the prompt's last tokens already begin the reply
    foil_ids       a wrong answer of the same type, its first token where the answer's first token stands
    """

    prompt_tokens: int
    question: Span | None = None
    lead_tokens: int = 0
    foil_ids: Sequence[int] | None = None

    @classmethod
    def of(cls, trial: Trial) -> PromptParts:
        return cls(len(trial.prompt_ids), trial.question_span, trial.lead_tokens, trial.foil_ids)


class Rows(NamedTuple):
    """The rows that are recorded, increasing, and the places in `recorded` of those that belong together."""

    recorded: list[int]
    foil_steps: list[int]  # which of the answer's tokens have another one of the foil in their place
    answer: Places  # each predicts a token of the answer
    foil: Places  # those of the foil's steps
    last: Places  # of the prompt
    anchors: Places  # the last of the prompt
    question: Places
    reply: Places  # each predicts a token of the reply that is not the answer's

    @classmethod
    def of(cls, answer_positions: Sequence[int], parts: PromptParts | None, answer_ids: Sequence[int] = ()) -> Rows:
        """answer_positions: indices, increasing, of the answer's tokens, which are `answer_ids`.

        Raises ValueError, naming it, for a part that does not lie in the prompt.
        """
        answer = [position - 1 for position in answer_positions]
        if parts is None:
            return cls(answer, [], slice(None), [], [], [], [], [])
        end = parts.prompt_tokens
        if not 0 < end <= answer_positions[0]:
            raise ValueError(f"prompt_tokens: expected 1..{answer_positions[0]}, in front of the answer, got {end}")
        if not 0 <= parts.lead_tokens < end:
            raise ValueError(f"lead_tokens: expected 0..{end - 1}, got {parts.lead_tokens}")
        first, last = parts.question or (0, 0)
        if parts.question is not None and not 0 <= first < last <= end:
            raise ValueError(f"question: expected 0 <= start < end <= {end}, got ({first}, {last})")
        of_the_answer = set(answer_positions)
        begun = range(max(end - parts.lead_tokens, 1), max(answer_positions) + 1)
        pairs = zip(answer_ids, parts.foil_ids or (), strict=False)
        foil_steps = [step for step, (token, other) in enumerate(pairs) if token != other]
        groups = [
            answer,
            [answer[step] for step in foil_steps],
            [end - 1],
            list(range(max(end - ANCHORS, 0), end)),
            list(range(first, last)),
            [position - 1 for position in begun if position not in of_the_answer],
        ]
        recorded = sorted({row for group in groups for row in group})
        place = {row: i for i, row in enumerate(recorded)}
        chosen = [_selector([place[row] for row in group]) for group in groups]
        return cls(recorded, foil_steps, *chosen)


def first_row(trial: Trial, detectors: Detectors) -> int:
    """The first row of a trial that is read; what stands in front of it may be shared between prompts."""
    parts = PromptParts.of(trial) if detectors == "all" else None
    return Rows.of(trial.answer_positions, parts, trial.answer_ids).recorded[0]


def _selector(places: list[int]) -> Places:
    """Consecutive places as a slice: an index from the host would wait for the device."""
    consecutive = places and places[-1] - places[0] + 1 == len(places)
    return slice(places[0], places[-1] + 1) if consecutive else places
