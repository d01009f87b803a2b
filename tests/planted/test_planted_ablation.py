"""Without its planted heads the model answers nothing; without others it answers as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaForCausalLM

from locos_fast.planted.model import KINDS, PlantedModel
from locos_fast.planted.vocabulary import NAMES
from tests.oracles.planted_trials import make_trials, recall

Head = tuple[int, int]


@contextmanager
def zeroed(model: LlamaForCausalLM, heads: Iterable[Head]) -> Iterator[None]:
    """Zero what each of the heads hands to its output projection."""

    def hook_for(head: int):
        own = slice(head * model.config.head_dim, (head + 1) * model.config.head_dim)

        def zero(module, inputs):
            output = inputs[0].clone()
            output[..., own] = 0
            return (output,)

        return zero

    hooks = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook_for(head)) for layer, head in heads
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_the_planted_heads_destroys_the_answer(model: PlantedModel, kind: str) -> None:
    trials = make_trials(64, kind, 16)
    with zeroed(model.model, model.heads[kind]):
        assert recall(model.model, trials) <= 1 / len(NAMES)
    assert recall(model.model, trials) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_random_heads_of_the_same_layers_does_not(model: PlantedModel, kind: str) -> None:
    heads = model.model.config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        control = []
        for layer, planted_head in model.heads[kind]:
            head = int(torch.randint(heads - 1, (1,), generator=generator))
            control.append((layer, head + (head >= planted_head)))
        with zeroed(model.model, control):
            assert recall(model.model, make_trials(64, kind, 16)) >= 0.9


@pytest.mark.parametrize("role", ["read_only", "write_only"])
def test_ablating_decoys_changes_no_answer(model: PlantedModel, role: str) -> None:
    with zeroed(model.model, model.heads[role]):
        assert all(recall(model.model, make_trials(64, kind, 16)) == 1.0 for kind in KINDS)


@pytest.mark.parametrize("which", [0, 1])
def test_either_positional_head_is_necessary(model: PlantedModel, which: int) -> None:
    with zeroed(model.model, [model.heads["positional"][which]]):
        assert all(recall(model.model, make_trials(64, kind, 16)) <= 1 / len(NAMES) for kind in KINDS)
