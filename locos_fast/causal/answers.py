"""What a model answers when heads are taken away: teacher-forced, over many trials."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.causal.ablation import CalibratedMeans, Head, ablate
from locos_fast.models.answer_pass import answer_logits, continued_logits
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.shared_prefixes import behind_shared_prefixes, trial_tree


class Answer(NamedTuple):
    """One trial's outcome, the right answer given token by token."""

    right: bool  # whether each of its tokens has the largest logit
    log_probability: float  # of all its tokens, nats


@torch.inference_mode()
def given_answers(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    heads: Sequence[Head] = (),
    *,
    mode: str = "output-zero",
    calibration: CalibratedMeans | None = None,
    token_chunk: int | None = TOKENS_PER_CHUNK,
) -> list[Answer]:
    """The answers to all trials, in their order, with `heads` ablated in every position; see `ablate` for the modes.

    What several prompts begin with is computed once, with the heads ablated in it, too; but each prompt whole where the
    heads may not see its needle, which differs from prompt to prompt.
    Raises ValueError as `ablate` does, for no trials, and for logits that are not finite.
    """
    if not trials:
        raise ValueError("trials: expected at least one, got none")
    answers: dict[int, Answer] = {}
    if heads and mode == "needle-knockout":
        return [_without_needle(model, trial, heads, token_chunk) for trial in trials]
    ablated = ablate(model, heads, mode=mode, calibration=calibration) if heads else contextlib.nullcontext()
    with ablated, token_chunks(model, token_chunk):
        for numbers, prefix in behind_shared_prefixes(model, trials, trial_tree(trials), token_chunk=token_chunk):
            for number, logits in zip(numbers, _logits(model, [trials[i] for i in numbers], prefix), strict=True):
                answers[number] = _answer(logits, trials[number].answer_ids)
    return [answers[number] for number in range(len(trials))]


def _without_needle(model: PreTrainedModel, trial: Trial, heads: Sequence[Head], token_chunk: int | None) -> Answer:
    with ablate(model, heads, mode="needle-knockout", needle=trial.needle_span), token_chunks(model, token_chunk):
        return _answer(_logits(model, [trial], None)[0], trial.answer_ids)


def _logits(model: PreTrainedModel, trials: list[Trial], prefix: PrefixCache | None) -> list[Tensor]:
    """(T, V) of each trial's answer rows."""
    device = model.get_input_embeddings().weight.device
    fed = [trial.input_ids[:, :-1].to(device) for trial in trials]
    rows = [[position - 1 for position in trial.answer_positions] for trial in trials]
    if len(trials) == 1 or prefix is None:
        return [answer_logits(model, *one, prefix) for one in zip(fed, rows, strict=True)]
    rests = [ids[:, prefix.tokens :] for ids in fed]
    return continued_logits(model, rests, [[row - prefix.tokens for row in of_one] for of_one in rows], prefix)


def _answer(logits: Tensor, answer_ids: list[int]) -> Answer:
    wanted = torch.tensor(answer_ids, device=logits.device)
    probabilities = logits.double().log_softmax(-1).gather(-1, wanted[:, None])
    return Answer(bool((logits.argmax(-1) == wanted).all()), float(probabilities.sum()))
