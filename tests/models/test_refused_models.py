"""What cannot be made exact is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, MambaConfig, OPTConfig, PreTrainedModel

from locos_fast.models.architecture import (
    UnsupportedModelError,
)
from locos_fast.scoring.directions import NORMS
from locos_fast.scoring.score import score_tokens
from tests.oracles.architecture_models import build
from tests.oracles.definition import ANSWER, LENGTH, text_layers
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import SMALL, Family, construct, tokens

IDENTITY = 1e-6  # transformers' norms and softmax compute in float32, also in a float64 model
NEEDLE = (17, 20)

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is not available")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def refused(model: nn.Module, match: str, norm: str = "frozen") -> None:
    with pytest.raises(UnsupportedModelError, match=match) as error:
        score_tokens(model, tokens(1, LENGTH), NEEDLE, ANSWER, norm=norm)
    assert "\n" not in str(error.value)


class Squash(nn.Module):
    """No norm: what it does to a row is no multiple of the row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_vision"])
def test_a_final_norm_that_cannot_be_pulled_back_is_refused(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    text_layers(model)[0].norm = Squash()
    refused(model, "Squash cannot be pulled back")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_after_attention_that_cannot_be_pulled_back_is_refused(dtype: torch.dtype) -> None:
    model = build("gemma2", dtype=dtype)
    model.model.layers[1].post_attention_layernorm = Squash()
    refused(model, "Squash cannot be pulled back")


def test_attention_that_changes_what_its_projection_returned_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda _, args, output: (1.01 * output[0], *output[1:]))
    refused(model, "layer 1: the output of LlamaAttention is not what its Linear returned")


def test_a_multiplier_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locos_fast.models.residual_stream._multipliers", lambda layer: [1.0])
    refused(build("granite"), r"layer 2 \(GraniteDecoderLayer\): cannot follow the output of GraniteAttention")


def test_a_final_multiplier_that_is_not_found_is_refused() -> None:
    model = build("granite")
    model.model.norm.register_forward_hook(lambda _, args, output: 1.5 * output)
    scores = score_tokens(model, tokens(1, LENGTH), NEEDLE, ANSWER, norm="frozen")
    assert scores.meta["completeness"]["overall"] <= IDENTITY  # the hook is part of what the norm did
    model.lm_head.register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    refused(model, "GraniteForCausalLM: cannot follow the residual stream from the last layer to the unembedding")


def test_a_stream_that_is_normalised_between_layers_is_refused() -> None:
    """As in OPT-350m, where it is; the other OPT models add to it only."""
    sizes = {"vocab_size": SMALL["vocab_size"], "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 40}
    for before in (True, False):
        config = OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, do_layer_norm_before=before)
        model = construct(Family(OPTConfig, config.to_dict()), "eager", dtype=torch.float64)
        if before:
            scores = score_tokens(model, tokens(1, LENGTH), NEEDLE, ANSWER, norm="frozen")
            assert scores.meta["completeness"]["overall"] <= IDENTITY
        else:
            refused(model, r"layer 1 \(OPTDecoderLayer\) changes the residual stream")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_stream_that_is_rescaled_is_refused(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    model.model.layers[1].register_forward_hook(lambda _, args, output: 0.7 * output, prepend=True)
    refused(model, r"layer 1 \(")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "family, place", [("gpt2", "drop"), ("gpt_neox", "post_mlp_dropout"), ("phi3", "resid_attn_dropout")]
)
def test_training_mode_with_dropout_is_refused(family: str, place: str, norm: str) -> None:
    model = build(family)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1 if name.endswith(place) else 0.0
    score_tokens(model, tokens(1, LENGTH), NEEDLE, ANSWER, norm=norm)
    refused(model.train(), rf"is in training mode and \S*{place} applies dropout; call model.eval\(\)", norm)


class PeftModel(nn.Module):
    """Passes on whatever it is asked, as PEFT's wrapper does."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


@pytest.mark.parametrize("norm", NORMS)
def test_wrapped_and_compiled_models_are_refused(norm: str) -> None:
    refused(PeftModel(build("llama")), r"PeftModel is no transformers model; .*get_base_model\(\)", norm)
    refused(torch.compile(build("llama")), "LlamaForCausalLM is compiled, which cannot be recorded", norm)


@pytest.mark.parametrize("norm", NORMS)
def test_falcon_and_mamba_are_refused(norm: str) -> None:
    sizes = {"vocab_size": SMALL["vocab_size"], "hidden_size": 32, "num_hidden_layers": 2}
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**sizes, num_attention_heads=4)).eval()
    refused(falcon, "FalconForCausalLM cannot be recorded: FalconAttention computes attention itself", norm)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**sizes, state_size=8)).eval()
    refused(mamba, "MambaForCausalLM has no softmax attention layers", norm)
