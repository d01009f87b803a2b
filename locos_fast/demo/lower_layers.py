"""The same prompt under many ablations: what lies below the first ablated layer is computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.causal.ablation import Head, ablate
from locos_fast.models.answer_pass import answer_logits
from locos_fast.models.architecture import decoder_layers
from locos_fast.prompts.trials import Trial


@torch.inference_mode()
def answers_without(model: PreTrainedModel, trial: Trial, head_sets: Sequence[Sequence[Head]]) -> list[bool] | None:
    """Whether the model answers right with each set of heads ablated; None if it does not with all of them.

    Right: every token of the answer is the model's own first choice. For decoders whose layers hand on nothing but the
    residual stream; an empty set repeats the intact model.
    """
    ids = trial.input_ids[:, :-1].to(model.get_input_embeddings().weight.device)
    rows = [position - 1 for position in trial.answer_positions]
    answer = torch.tensor(trial.answer_ids)

    def right() -> bool:
        return bool((answer_logits(model, ids, rows).argmax(-1).cpu() == answer).all())

    layers = decoder_layers(model)
    first = [min((layer for layer, _ in heads), default=0) for heads in head_sets]
    with _keep_outputs(layers, {layer - 1 for layer in first} - {-1}) as kept:
        if not right():
            return None
    results = []
    for heads, layer in zip(head_sets, first, strict=True):
        without = ablate(model, heads) if heads else contextlib.nullcontext()
        with _replace(layers[:layer], kept.get(layer - 1)), without:
            results.append(right())
    return results


@contextlib.contextmanager
def _keep_outputs(layers: nn.ModuleList, numbers: Collection[int]) -> Iterator[dict[int, Any]]:
    """Layer number -> what the layer returned, of the layers named."""
    kept: dict[int, Any] = {}

    def keep(number: int) -> Any:
        return lambda module, given, returned: kept.__setitem__(number, returned)

    hooks = [layers[number].register_forward_hook(keep(number)) for number in numbers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _replace(layers: nn.ModuleList, output: Tensor | tuple | None) -> Iterator[None]:
    """Every one of these layers returns at once what the last one returned before."""
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda *given, **named: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
