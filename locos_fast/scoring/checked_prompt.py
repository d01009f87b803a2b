"""One prompt that is to be scored, its arguments checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import check_prompt
from locos_fast.scoring.directions import Target
from locos_fast.scoring.needle import Span, check_needle, union
from locos_fast.scoring.prompt_parts import PromptParts, Rows
from locos_fast.scoring.token_ids import check_foil_ids, check_token_ids, contrast_ids


class Prompt(NamedTuple):
    """What `score_tokens` is given of one prompt."""

    input_ids: Tensor  # (1, N)
    spans: list[Span]  # disjoint, increasing
    answer_positions: list[int]  # increasing
    contrast: str | list[int] | None
    parts: PromptParts | None
    rows: Rows

    @classmethod
    def checked(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        needle_span: Span | Sequence[Span],
        answer_positions: Sequence[int],
        *,
        contrast: str | Sequence[int] | None = None,
        parts: PromptParts | None = None,
    ) -> Prompt:
        """Raises ValueError, naming the argument, for what does not fit."""
        spans = union(needle_span)
        positions = check_prompt(input_ids, answer_positions)
        check_needle(spans, input_ids.shape[1], positions)
        check_token_ids(model, input_ids, positions)
        in_order, contrast = _in_order(positions, contrast_ids(model, contrast, len(positions)))
        if parts is not None and parts.foil_ids:
            check_foil_ids(model, parts.foil_ids)
        rows = Rows.of(in_order, parts, input_ids[0, in_order].tolist())
        return cls(input_ids, spans, in_order, contrast, parts, rows)

    @property
    def answer_rows(self) -> list[int]:
        return [position - 1 for position in self.answer_positions]

    @property
    def fed(self) -> Tensor:
        """(1, n): a causal model's answer rows do not depend on anything later."""
        return self.input_ids[:, : max(self.answer_rows) + 1]

    @property
    def answer_ids(self) -> Tensor:
        """(T,)"""
        return self.input_ids[0, self.answer_positions]

    def targets(self) -> dict[str, Target]:
        """What heads are scored toward: the answer and, where there is one, the foil in its place."""
        targets = {"answer": Target.of(self.answer_ids, self.contrast)}
        if self.parts is not None and self.parts.foil_ids and self.rows.foil_steps:
            targets["foil"] = targets["answer"].instead(self.parts.foil_ids)
        return targets

    def has(self) -> set[str]:
        """The needs of detectors that the prompt itself meets."""
        if self.parts is None:
            return set()
        has = {"prompt"} | ({"question"} if self.parts.question is not None else set())
        return has | ({"foil"} if self.rows.foil_steps else set())


def _in_order(positions: list[int], contrast: str | list[int] | None) -> tuple[list[int], str | list[int] | None]:
    """Answer positions in increasing order, and the contrast tokens with them."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    return [positions[i] for i in order], [contrast[i] for i in order] if isinstance(contrast, list) else contrast
