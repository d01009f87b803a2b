"""Trials of the planted model, and the share of them it answers."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from locos_fast import planted
from locos_fast.prompts.trials import Trial


def make_trials(length: int, kind: str, count: int) -> list[Trial]:
    return [planted.trial(length, kind, depth=100 * i / max(count - 1, 1), seed=i) for i in range(count)]


@torch.inference_mode()
def recall(model: LlamaForCausalLM, trials: list[Trial]) -> float:
    """Share of the trials, all of one length, whose answer has the largest logit."""
    prompts = torch.tensor([trial.prompt_ids for trial in trials])
    answers = torch.tensor([trial.answer_ids[0] for trial in trials])
    logits = model(prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
    return (logits.argmax(-1) == answers).float().mean().item()
