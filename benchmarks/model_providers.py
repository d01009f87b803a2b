"""What the model suite times: one full pass each, from a model and token ids to logits or scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.model_cases import ModelCase
from locos_fast import attribute_tokens, score_tokens
from locos_fast.models.answer_pass import answer_logits

FORWARD, AGAIN = "forward", "forward.again"
SCORE, FROZEN, CHUNKED = "score_tokens", "score_tokens.frozen", "score_tokens.chunked"
ATTRIBUTE = "attribute_tokens"

Pass = Callable[[PreTrainedModel, Tensor, ModelCase], Any]


class ModelProvider(NamedTuple):
    name: str
    run: Pass
    remark: str = ""


def forward(model: PreTrainedModel, ids: Tensor, case: ModelCase) -> Tensor:
    """The bare forward pass, called as scoring calls it: no cache, logits of the answer rows only."""
    with torch.inference_mode():
        return answer_logits(model, ids[:, :-1], [position - 1 for position in case.answer_positions])


def score(*, norm: str = "none") -> Pass:
    def run(model: PreTrainedModel, ids: Tensor, case: ModelCase) -> Any:
        return score_tokens(model, ids, case.needle, case.answer_positions, norm=norm, token_chunk=None)

    return run


def score_in_chunks(model: PreTrainedModel, ids: Tensor, case: ModelCase) -> Any:
    return score_tokens(model, ids, case.needle, case.answer_positions, token_chunk=case.token_chunk)


def attribute(model: PreTrainedModel, ids: Tensor, case: ModelCase) -> Any:
    return attribute_tokens(model, ids, case.answer_positions, case.segments, token_chunk=None)


PROVIDERS = (
    ModelProvider(FORWARD, forward),
    ModelProvider(AGAIN, forward, "the same forward pass once more in every round: what the clock can tell apart"),
    ModelProvider(SCORE, score(), "with token_chunk=None, as the forward pass runs"),
    ModelProvider(FROZEN, score(norm="frozen"), 'norm="frozen", token_chunk=None'),
    ModelProvider(CHUNKED, score_in_chunks, "MLPs and norms token_chunk tokens at a time; shorter prompts run whole"),
    ModelProvider(ATTRIBUTE, attribute, "the prompt in 1,000 segments, or one a token; token_chunk=None"),
)
