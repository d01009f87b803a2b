"""What record() refuses: rows that were never computed, arguments that fit nothing, models it cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, MambaConfig

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.scoring.recording import record
from tests.oracles.listening import registry
from tests.oracles.recordings import LENGTH, ROWS, SPANS
from tests.oracles.tiny_models import UNCOMPILED_FLEX, VOCABULARY, build, tokens

pytestmark = [*UNCOMPILED_FLEX, pytest.mark.usefixtures("no_gradients")]

# --- what was never computed


def test_a_model_that_never_runs_is_an_error() -> None:
    missing = r"layer 0 .* never computed an answer row"
    with pytest.raises(RuntimeError, match=missing), record(build("llama"), [3], SPANS):
        pass


def test_a_layer_that_bypasses_the_interface_is_an_error() -> None:
    """GPT-2 computes reordered attention itself, although its source names the attention interface."""
    model = build("gpt2", "eager", reorder_and_upcast_attn=True)
    with pytest.raises(RuntimeError, match=r"layer 0 \(GPT2Attention\) never computed"), record(model, ROWS, SPANS):
        model(tokens(1, LENGTH))


@pytest.mark.parametrize("rows", [[3, LENGTH], torch.tensor([[3, 4], [5, LENGTH]])])
def test_a_row_that_is_never_computed_is_an_error(rows: Any) -> None:
    model = build("llama", "sdpa")
    missing = rf"rows \[{LENGTH}\] were never computed in layer 0"
    with pytest.raises(RuntimeError, match=missing), record(model, rows, SPANS):
        model(tokens(2, LENGTH))


@pytest.mark.parametrize("rows", [[], [-1], [[[1]]], torch.tensor(3)])
def test_rows_that_are_no_slots_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="rows: expected"), record(build("llama"), rows, SPANS):
        pass


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_another_batch_are_refused(batch: int) -> None:
    model = build("llama", "sdpa")
    with pytest.raises(ValueError, match="rows: expected"), record(model, torch.tensor([[3], [4]]), SPANS):
        model(tokens(batch, LENGTH))


@pytest.mark.parametrize("spans", [[], [(5, 3)], [(-1, 3)], torch.tensor([[[0, 2]], [[1, 3]]])])
def test_spans_that_fit_nothing_are_refused(spans: Any) -> None:
    model, before = build("llama", "sdpa"), registry()
    with pytest.raises(ValueError, match="spans: expected"), record(model, ROWS, spans):
        model(tokens(1, LENGTH))
    assert registry() == before


# --- models that cannot be recorded


def refuse(model: nn.Module, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as error, record(model, ROWS, SPANS):
        model(tokens(1, LENGTH))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, dropout", [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_is_refused(family: str, dropout: str) -> None:
    before = registry()
    refuse(build(family, "sdpa", **{dropout: 0.1}).train(), "applies (attention )?dropout; call model.eval()")
    assert registry() == before


def test_training_mode_without_dropout_is_recorded() -> None:
    model = build("llama", "sdpa").train()
    with record(model, ROWS, SPANS, verify=True) as kept:
        model(tokens(1, LENGTH))
    assert len(kept) == 3


def compile_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def compile_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward)
    return model


def compile_decoder(model: nn.Module) -> nn.Module:
    model.model = torch.compile(model.model)
    return model


def compile_layer(model: nn.Module) -> nn.Module:
    model.model.layers[1].compile()
    return model


@pytest.mark.parametrize(
    "how, name",
    [
        (compile_whole, "LlamaForCausalLM"),
        (compile_in_place, "LlamaForCausalLM"),
        (compile_forward, "LlamaForCausalLM"),
        (compile_decoder, "LlamaModel"),
        (compile_layer, "LlamaDecoderLayer"),
    ],
)
def test_compiled_models_are_refused(how: Callable[[nn.Module], nn.Module], name: str) -> None:
    refuse(how(build("llama", "sdpa")), f"{name} is compiled, which cannot be recorded")


class DTensor(nn.Parameter):
    """Looks to the recorder like a shard of a tensor-parallel weight."""


def test_tensor_parallel_models_are_refused() -> None:
    model = build("llama", "sdpa")
    model.lm_head.weight = DTensor(model.lm_head.weight.data)
    refuse(model, "LlamaForCausalLM is tensor-parallel")


def test_weights_on_the_meta_device_are_refused() -> None:
    model = build("llama", "sdpa")
    model.lm_head.to("meta")
    refuse(model, r"LlamaForCausalLM has weights on the meta device \(lm_head.weight\)")


TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


def test_attention_outside_the_interface_is_refused() -> None:
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**TINY, num_attention_heads=4)).eval()
    refuse(falcon, "FalconForCausalLM cannot be recorded: FalconAttention computes attention itself")


def test_models_without_attention_are_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**TINY, state_size=8)).eval()
    refuse(mamba, "MambaForCausalLM has no softmax attention layers")
