"""The channels of a head's query are found whatever the layout of the projection, or the model is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from locos_fast.causal.ablation import ablate
from locos_fast.models import query_channels
from locos_fast.models.architecture import UnsupportedModelError, attention_layers
from locos_fast.models.query_channels import QueryProjection, query_projections
from tests.oracles import architecture_models, further_families
from tests.oracles.architecture_models import FAMILIES
from tests.oracles.tiny_models import build, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*kernel")


def found(model: PreTrainedModel) -> dict[int, QueryProjection]:
    return query_projections(model, attention_layers(model))


def of_any_kind(family: str) -> PreTrainedModel:
    return architecture_models.build(family) if family in FAMILIES else further_families.build(family)


# family -> (name of the module, width of its output, first channel of each of the four heads, channels of a head)
LAYOUTS = {
    "llama": ("q_proj", 64, (0, 16, 32, 48), 16),
    "qwen3_next": ("q_proj", 128, (0, 32, 64, 96), 16),  # each head's gate follows its query
    "phi3": ("qkv_proj", 64, (0, 8, 16, 24), 8),  # all queries, then keys and values
    "gpt2": ("c_attn", 96, (0, 8, 16, 24), 8),
    "gpt_neox": ("query_key_value", 96, (0, 24, 48, 72), 8),  # head by head
    "CodeGen": ("qkv_proj", 96, (0, 24, 48, 72), 8),
    "GPTBigCode": ("c_attn", 48, (0, 8, 16, 24), 8),  # one key/value head
    "deepseek_v3": ("q_b_proj", 48, (0, 12, 24, 36), 12),  # behind a compression
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_layouts(family: str) -> None:
    if family not in FAMILIES and not further_families.known({family: {}}):
        pytest.skip("this release of transformers has it not, or not on the attention interface")
    name, width, first, size = LAYOUTS[family]
    model = of_any_kind(family)
    for layer in attention_layers(model):
        projection = found(model)[layer.number]
        assert projection.module is getattr(layer.module, name)
        assert projection.channels == [list(range(start, start + size)) for start in first]
        assert width > max(map(max, projection.channels))
        assert not projection.normed_together


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_any_dtype_and_inside_inference_mode(dtype: torch.dtype) -> None:
    model = build("qwen3", "sdpa", dtype=dtype)
    with torch.inference_mode():
        projections = found(model)
    assert [projections[layer].channels[3] for layer in range(3)] == [list(range(48, 64))] * 3


def test_flex_attention_is_not_asked() -> None:
    assert found(build("llama", "flex_attention"))[0].channels[1] == list(range(16, 32))


def test_a_module_is_asked_once_and_again_when_it_has_other_parts() -> None:
    model, passes = build("llama", "sdpa"), []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(None))
    first = found(model)
    assert len(passes) == 1
    assert found(model) == first
    assert len(passes) == 1
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Linear(32, 64, bias=False)
    assert found(model)[1].module is attention.q_proj
    assert len(passes) == 2
    hook.remove()


def test_a_wrapped_projection_is_taken_whole() -> None:
    """As of an adapter, whose share is added to that of the projection inside."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.added = base, nn.Linear(32, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.added(x)

    model = build("llama", "sdpa")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    assert found(model)[0].module is attention.q_proj


def test_a_norm_over_all_heads_is_said_when_a_query_is_set() -> None:
    model = architecture_models.build("olmo2")
    assert all(projection.normed_together for projection in found(model).values())
    assert found(model)[0].channels[1] == list(range(8, 16))
    with (
        pytest.warns(UserWarning, match=r"layers \[0, 2\] normalise the queries of all heads together"),
        ablate(model, [(0, 1), (2, 0)], mode="query-zero"),
    ):
        pass
    with (
        warnings.catch_warnings(action="error"),
        ablate(architecture_models.build("qwen3_moe"), [(0, 1)], mode="query-zero"),
    ):
        pass


ROTATED = modeling_llama.apply_rotary_pos_emb
MIXED = {
    "no module was found whose output channels each make the query of one head": lambda q, k: (q + q.flip(1), k),
    "keys or values are made of the same channels": lambda q, k: (q, k + q[:, :2]),
    "more than its Linear goes into it": lambda q, k: (q + k.repeat_interleave(2, 1), k),
}


@pytest.mark.parametrize("why", MIXED)
def test_what_cannot_be_told_apart_is_refused_with_the_reason(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        return MIXED[why](*ROTATED(q, k, cos, sin))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", mixed)
    model = build("llama", "sdpa")
    with (
        pytest.raises(UnsupportedModelError, match=rf"layer 0 \(LlamaAttention\): the query of a head .* {why}"),
        ablate(model, [(0, 1)], mode="query-zero"),
    ):
        pass


def test_nothing_of_the_probe_stays() -> None:
    model, ids = build("gemma3", "sdpa"), tokens(1, 20)
    with torch.no_grad():
        before = model(ids).logits
    found(model)
    assert not sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not query_channels.registry.interventions
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
