"""One question about one planted or inserted sentence: what is asked of the model and where the evidence lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A prompt that contains the needle and ends with the question, and the answer that should follow it.

    prompt_ids   token ids of everything before the answer: special tokens, context with the needle, question
    needle_span  (start, end), half-open, in prompt_ids
    answer_ids   token ids of the answer
    depth        where the needle lies in the context, in percent: 0 is the beginning, 100 the end
    length       tokens in the prompt
    requested_depth  the depth that was asked for, where the needle was put at a sentence boundary near it
    requested_length the tokens that were asked for, where the prompt was cut to at most that many
    context_sha256   hex digest of the context's text as it was given, in UTF-8, where there is one
    question_span    (start, end), half-open, in prompt_ids, where the question's tokens are known
    lead_tokens      how many of the prompt's last tokens already belong to the reply
    foil, foil_ids   a wrong answer of the same type and its token ids behind the prompt, where there is one

    Raises ValueError, naming the field, for an empty answer, a span outside the prompt, a depth outside 0..100, or a
    length that is not the prompt's.
    """

    prompt_ids: list[int]
    needle_span: tuple[int, int]
    answer_ids: list[int]
    question: str
    needle: str
    answer: str
    depth: float
    length: int
    id: str
    requested_depth: float | None = None
    requested_length: int | None = None
    context_sha256: str | None = None
    question_span: tuple[int, int] | None = None
    lead_tokens: int = 0
    foil: str | None = None
    foil_ids: list[int] | None = None

    def __post_init__(self) -> None:
        start, end = self.needle_span
        if not self.answer_ids:
            raise ValueError("answer_ids: expected at least one token, got none")
        if not 0 <= start < end <= len(self.prompt_ids):
            raise ValueError(
                f"needle_span: expected 0 <= start < end <= {len(self.prompt_ids)} (tokens of prompt_ids), "
                f"got ({start}, {end})"
            )
        if self.question_span is not None and not 0 <= self.question_span[0] < self.question_span[1] <= len(
            self.prompt_ids
        ):
            raise ValueError(f"question_span: expected a span inside the prompt's tokens, got {self.question_span}")
        if not 0 <= self.lead_tokens < len(self.prompt_ids):
            raise ValueError(f"lead_tokens: expected fewer than the prompt's tokens, got {self.lead_tokens}")
        if not 0 <= self.depth <= 100:
            raise ValueError(f"depth: expected a percentage in 0..100, got {self.depth}")
        if self.length != len(self.prompt_ids):
            raise ValueError(f"length: expected {len(self.prompt_ids)} (tokens of prompt_ids), got {self.length}")

    @property
    def input_ids(self) -> Tensor:
        """Prompt followed by the answer, (1, N) int64."""
        return torch.tensor([[*self.prompt_ids, *self.answer_ids]])

    @property
    def answer_positions(self) -> list[int]:
        """Indices of the answer's tokens in `input_ids`; row p - 1 of the logits predicts token p."""
        prompt = len(self.prompt_ids)
        return list(range(prompt, prompt + len(self.answer_ids)))

    def describe(self) -> dict[str, Any]:
        """What was asked and where the needle lies, for the `meta` of scores (JSON)."""
        return {
            "trial": self.id,
            "question": self.question,
            "needle": self.needle,
            "answer": self.answer,
            "depth": self.depth,
            "requested_depth": self.requested_depth,
            "context_sha256": self.context_sha256,
        }
