"""Tiny models with random weights, one for each way in which a model can attend.

Weights are drawn in float64 from a fixed seed and then rounded, so that a family is the same model in every dtype and
under every attention implementation. They are large enough for attention to be far from uniform.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
WINDOW = 8  # slots a sliding layer sees, itself included; also the chunk of Llama-4
GAIN = 1.5  # standard deviation of queries and keys, so that scores have one of about 2 nats


class Family(NamedTuple):
    """How to build a model, and the attention implementations it accepts on a CPU."""

    config: type[PreTrainedConfig]
    settings: dict[str, Any]
    implementations: tuple[str, ...] = ("sdpa", "eager", "flex_attention")


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,  # generate() runs to the end
    "pad_token_id": None,
}
WIDE = {**SMALL, "head_dim": 16}  # heads * head_dim is twice the hidden size
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES = {
    "llama": Family(LlamaConfig, WIDE),
    "mistral": Family(MistralConfig, {**WIDE, "sliding_window": WINDOW}),
    "qwen2": Family(Qwen2Config, SMALL),
    "qwen3": Family(Qwen3Config, WIDE),
    # sdpa has no softcap
    "gemma2": Family(
        Gemma2Config,
        {**WIDE, **ALTERNATING, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0},
        ("eager", "flex_attention"),
    ),
    "gemma3": Family(Gemma3TextConfig, {**WIDE, **ALTERNATING, "query_pre_attn_scalar": 12}),
    # sdpa has no sinks, and flex_attention has none on a CPU
    "gpt_oss": Family(
        GptOssConfig,
        {**WIDE, **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PLAIN_ROPE},
        ("eager",),
    ),
    "gpt2": Family(
        GPT2Config,
        {"vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 4}
        | dict.fromkeys(("bos_token_id", "eos_token_id")),
        ("sdpa", "eager"),
    ),
    "llama4": Family(
        Llama4TextConfig,
        {**WIDE, "intermediate_size_mlp": 40, "num_local_experts": 2, "attention_chunk_size": WINDOW}
        | {"no_rope_layers": [1, 0, 1]},  # two chunked layers around one that sees everything
    ),
}
# for a module whose tests run flex_attention: `plain_torch` stands in tests/conftest.py
UNCOMPILED_FLEX = [
    pytest.mark.usefixtures("plain_torch"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers sets it
]
PAIRS = [(family, attention) for family, kind in FAMILIES.items() for attention in kind.implementations]


def build(
    family: str, attention: str = "eager", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A model of this family, in evaluation mode; `settings` override those of its configuration."""
    return construct(FAMILIES[family], attention, dtype=dtype, seed=seed, **settings)


def construct(
    kind: Family, attention: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A model of this kind, its parameters drawn at random."""
    model = AutoModelForCausalLM.from_config(
        kind.config(**{**kind.settings, **settings}),
        attn_implementation=attention,
        experts_implementation="eager",  # transformers' grouped matrix product has no double precision
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * GAIN * parameter.shape[-1] ** -0.5)
            else:  # biases and norms stay near 0 or 1; sinks, which transformers draws at random, are near 0
                parameter.copy_(parameter.double().round() + 0.3 * noise)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def visible_keys(model: PreTrainedModel, layer: int, length: int, padding: int = 0) -> Tensor:
    """Which keys each row of a layer sees, (length, length) bool; `padding` slots on the left are no tokens."""
    config = model.config.get_text_config(decoder=True)
    row, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (key <= row) & (key >= padding)
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types else "sliding_attention"
    if kind == "chunked_attention":
        chunk = config.attention_chunk_size
        return seen & ((key - padding).div(chunk, rounding_mode="floor") == (row - padding) // chunk)
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    return seen if window is None else seen & (key > row - window)


@contextmanager
def captured_values(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> value states (B, Hkv, N, Dv) of the last forward pass, read from the projections that make them."""
    values: dict[int, Tensor] = {}

    def keep(attention: nn.Module, states: Tensor) -> None:
        values[attention.layer_idx] = states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def hook(attention: nn.Module) -> Any:
        if hasattr(attention, "v_proj"):
            return attention.v_proj.register_forward_hook(lambda *call: keep(attention, call[2]))
        return attention.c_attn.register_forward_hook(lambda *call: keep(attention, call[2].chunk(3, dim=-1)[2]))

    hooks = [hook(module) for module in model.modules() if hasattr(module, "v_proj") or hasattr(module, "c_attn")]
    try:
        yield values
    finally:
        for handle in hooks:
            handle.remove()
