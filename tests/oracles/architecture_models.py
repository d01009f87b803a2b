"""Tiny random models of every family that is scored, added to those of `tiny_models`.

Norm weights, biases, multipliers and scalars are all drawn at random or set away from 1, so that forgetting one shows.
"""

from __future__ import annotations

import torch
from transformers import (
    Cohere2Config,
    DeepseekV3Config,
    Gemma3Config,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from tests.oracles import tiny_models
from tests.oracles.tiny_models import ALTERNATING, SMALL, VOCABULARY, WIDE, WINDOW, Family, construct

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GEMMA3 = tiny_models.FAMILIES["gemma3"].settings
GEMMA4 = {**WIDE, "sliding_window": WINDOW, "global_head_dim": 24, "final_logit_softcapping": 5.0}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

FAMILIES = tiny_models.FAMILIES | {
    "mixtral": Family(MixtralConfig, {**WIDE, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen3_moe": Family(Qwen3MoeConfig, {**WIDE, **EXPERTS}),
    "gemma": Family(GemmaConfig, WIDE),
    "gemma3_vision": Family(
        Gemma3Config,
        {
            "text_config": GEMMA3 | {"pad_token_id": 0},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
            "boi_token_index": VOCABULARY - 2,
            "eoi_token_index": VOCABULARY - 3,
        },
    ),
    # the last two layers reuse the keys and values of the first two
    "gemma4": Family(
        Gemma4TextConfig,
        GEMMA4
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    # full layers have fewer key-value heads, and use their keys as values
    "gemma4_moe": Family(
        Gemma4TextConfig,
        GEMMA4
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "olmo2": Family(Olmo2Config, SMALL),
    "olmo3": Family(Olmo3Config, {**SMALL, **ALTERNATING}),
    "phi3": Family(Phi3Config, {**SMALL, "rope_parameters": HALF_ROTARY, "sliding_window": WINDOW}),
    "granite": Family(
        GraniteConfig,
        {
            **SMALL,
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
            "attention_bias": True,
        },
    ),
    "cohere2": Family(Cohere2Config, {**SMALL, **ALTERNATING, "logit_scale": 0.25, "pad_token_id": 0}),
    "glm4": Family(Glm4Config, {**WIDE, "rope_parameters": HALF_ROTARY}),
    "gpt_neox": Family(GPTNeoXConfig, {**SMALL, "use_parallel_residual": True}),
    "gpt_neox_sequential": Family(GPTNeoXConfig, {**SMALL, "use_parallel_residual": False}),
    "qwen3_next": Family(
        Qwen3NextConfig,
        {
            **WIDE,
            **EXPERTS,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 24,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": HALF_ROTARY,
        },
    ),
    "smollm3": Family(
        SmolLM3Config,
        {**SMALL, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "deepseek_v3": Family(
        DeepseekV3Config,
        {
            **SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
}


def build(family: str, attention: str = "eager", *, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model of this family, in evaluation mode."""
    torch.manual_seed(0)  # some decays and sinks are drawn by transformers, and only rounded by us
    model = construct(FAMILIES[family], attention, dtype=dtype)
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "layer_scalar")):
        module.layer_scalar.fill_(0.6 + 0.3 * number)  # a buffer, 1 unless loaded
    return model
