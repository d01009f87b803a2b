"""What stands between heads and output projection is shown to be a factor per channel, or the layer is refused.

Completeness cannot show it: a layer that mixes its heads has contributions that add up all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.causal.ablation import ablate
from locos_fast.models.architecture import UnsupportedModelError, attention_layers
from locos_fast.models.head_map import check_head_map
from locos_fast.scoring.attribute_tokens import attribute_tokens
from locos_fast.scoring.diagnosis import diagnose
from locos_fast.scoring.recording import record
from locos_fast.scoring.score import score_tokens
from tests.oracles import architecture_models, tiny_models
from tests.oracles.definition import ANSWER, LENGTH
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import SMALL, tokens

NEEDLE = (10, 20)
LAYER = 1  # the one that is changed
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def between(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Llama whose second layer does `change` to (B, N, 64) of its heads in front of its output projection."""
    model = tiny_models.build("llama", dtype=dtype)
    layer = attention_layers(model)[LAYER]
    # ahead of every other hook, so that the projection is given what is changed
    layer.projection.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    return model


def kosmos() -> PreTrainedModel:
    sizes = {"vocab_size": 61, "embed_dim": 32, "ffn_dim": 40, "layers": 2, "attention_heads": 4, "dropout": 0.0}
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextForCausalLM

    torch.manual_seed(0)
    return Kosmos2TextForCausalLM(transformers.models.kosmos2.configuration_kosmos2.Kosmos2TextConfig(**sizes)).eval()


def differential() -> PreTrainedModel:
    return tiny_models.construct(tiny_models.Family(transformers.DiffLlamaConfig, SMALL), "eager")


def refused_by_all(model: PreTrainedModel, match: str) -> None:
    """In one sentence, and the same whatever is asked of the model."""
    ids = tokens(1, LENGTH)
    asked: list[Callable] = [
        lambda: score_tokens(model, ids, NEEDLE, ANSWER, norm="none"),
        lambda: score_tokens(model, ids, NEEDLE, ANSWER, norm="frozen"),
        lambda: attribute_tokens(model, ids, ANSWER, [NEEDLE]),
        lambda: diagnose(model),
        lambda: check_head_map(model, ids),
    ]
    sentences = set()
    for ask in asked:
        with pytest.raises(UnsupportedModelError, match=match) as error:
            ask()
        sentences.add(str(error.value))
    assert len(sentences) == 1
    assert "\n" not in sentences.pop()


# --- factors


def gate(x: Tensor) -> Tensor:
    return x * torch.linspace(-1.0, 2.0, x.shape[-1]).to(x)


def rms_norm(x: Tensor) -> Tensor:
    """Over all heads, as BitNet's."""
    return gate(x) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rms_norm_of_each_head(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, -1))
    return gate((heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6)).flatten(-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [lambda x: x, gate, rms_norm, rms_norm_of_each_head])
def test_factors_are_accepted(change: Callable, dtype: torch.dtype) -> None:
    check_head_map(between(change, dtype), tokens(1, LENGTH))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3_next", "llama", "gemma4", "deepseek_v3"])
def test_families_with_and_without_a_gate_are_accepted(family: str, dtype: torch.dtype) -> None:
    check_head_map(architecture_models.build(family, dtype=dtype), tokens(1, LENGTH))


@pytest.mark.parametrize("change", [gate, rms_norm, rms_norm_of_each_head])
def test_what_is_accepted_splits_by_tokens(change: Callable) -> None:
    """Two halves of the context add up to the whole, and a part is what the projection makes of the part of the head
    output times the factor of this forward."""
    model, ids = between(change, torch.float64), tokens(1, LENGTH)
    halves = attribute_tokens(model, ids, ANSWER, [(0, 12), (12, LENGTH), (0, LENGTH)])
    torch.testing.assert_close(torch.tensor(halves[..., :2].sum(-1)), torch.tensor(halves[..., 2]))
    rows = [position - 1 for position in ANSWER]
    given: list[Tensor] = []
    layer = attention_layers(model)[LAYER]
    layer.projection.register_forward_pre_hook(lambda _, args: given.append(args[0][0, rows]))
    with record(model, rows, [(0, 12)]) as recording, torch.no_grad():
        model(ids)
    kept = recording[LAYER]
    part = kept.span_output[0, :, :, 0].transpose(0, 1) * given[0].view_as(kept.output[0]) / kept.output[0]
    through = layer.projection.weight.unflatten(1, part.shape[1:])  # (hidden, H, Dv)
    expected = torch.einsum("thd,chd,tc->h", part, through, model.lm_head.weight[ids[0, ANSWER]]) / len(ANSWER)
    torch.testing.assert_close(torch.tensor(halves[LAYER, :, 0]), expected.detach(), rtol=1e-6, atol=1e-6)


# --- no factors


def layer_norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def biased(x: Tensor) -> Tensor:
    return gate(x) + 1e-3


def squashed(x: Tensor) -> Tensor:
    return torch.tanh(x)


def shared_between_heads(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, -1))
    return (heads + 0.5 * heads.roll(1, -2)).flatten(-2)


def mixed_within_a_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).flip(-1).flatten(-2)


def mixed_over_tokens(x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change", [layer_norm, biased, squashed, shared_between_heads, mixed_within_a_head, mixed_over_tokens]
)
def test_what_is_no_factor_is_refused_and_names_the_layer(change: Callable, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 1: what LlamaAttention does .* is no factor"):
        check_head_map(between(change, dtype), tokens(1, LENGTH))


def test_a_layer_norm_between_is_refused_by_all() -> None:
    refused_by_all(between(layer_norm), "layer 1: what LlamaAttention does to the outputs of its heads")


def test_kosmos_is_refused_by_all() -> None:
    refused_by_all(kosmos(), "layer 0: what KosmosTextAttention does to the outputs of its heads")


def test_differential_attention_is_refused_by_all() -> None:
    model = differential()
    several = r"layer 0 \(DiffLlamaAttention\) calls its attention function several times for one row"
    refused_by_all(model, several)
    with pytest.raises(UnsupportedModelError, match=several), record(model, [LENGTH - 1], [NEEDLE]), torch.no_grad():
        model(tokens(1, LENGTH))


# --- once per model


def count_forwards(model: PreTrainedModel) -> list[int]:
    """Tokens of each forward pass from here on."""
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


def test_a_model_is_shown_once_and_again_when_something_in_it_changed() -> None:
    model, ids = tiny_models.build("llama"), tokens(1, LENGTH)
    lengths = count_forwards(model)
    for _ in range(2):
        score_tokens(model, ids, NEEDLE, ANSWER)
    attribute_tokens(model, ids, ANSWER, [NEEDLE])
    answered = max(ANSWER)
    assert lengths == [8, answered, answered, answered]
    projection = attention_layers(model)[LAYER].projection
    hook = projection.register_forward_pre_hook(lambda _, args: (layer_norm(args[0]),))
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        check_head_map(model, ids)
    hook.remove()
    check_head_map(model, ids)


def test_ablated_heads_are_scored() -> None:
    model = tiny_models.build("llama")
    with ablate(model, [(LAYER, 0), (LAYER, 2)]):
        scores = score_tokens(model, tokens(1, LENGTH), NEEDLE, ANSWER)
    assert (scores.dla[LAYER] != 0).tolist() == [False, True, False, True]


def test_a_model_and_the_random_numbers_of_the_caller_are_left_as_they_were() -> None:
    model, ids = tiny_models.build("qwen3"), tokens(1, LENGTH)
    before, state = model(ids).logits, torch.get_rng_state()
    check_head_map(model, ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
