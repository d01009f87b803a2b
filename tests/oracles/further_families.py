"""Tiny random models of further classes of transformers, for the table of families and for the definition of scores.

They are looked up by name: a class that the installed transformers does not have yet is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.oracles.architecture_models import EXPERTS, HALF_ROTARY
from tests.oracles.tiny_models import ALTERNATING, SMALL, VOCABULARY, WIDE, WINDOW, Family, construct

LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
GRANITE = {
    "embedding_multiplier": 1.7,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FEW = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**FEW, "intermediate_size": 40, "is_decoder": True}

# name of the class without "Config" -> settings
EXACT: dict[str, dict[str, Any]] = {
    "Afmoe": {**WIDE, **EXPERTS, "num_dense_layers": 1, **ALTERNATING},
    "Apertus": SMALL,
    "Arcee": WIDE,
    "Bamba": {**SMALL, **MAMBA, "attn_layer_indices": [1]},
    "BioGpt": {**FEW, "intermediate_size": 40},
    "BitNet": SMALL,
    "CodeGen": {**GPT, "rotary_dim": 4},
    "Cohere": {**SMALL, "pad_token_id": 0, "logit_scale": 0.25},
    "DeepseekV2": {**SMALL, **LATENT, **ROUTED},
    "Dots1": {**WIDE, **ROUTED},
    "Ernie4_5": WIDE,
    "Ernie4_5_Moe": {
        **SMALL,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
    },
    "Exaone4": {**SMALL, **ALTERNATING},
    "FlexOlmo": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "Glm": {**WIDE, "pad_token_id": 0, "rope_parameters": HALF_ROTARY},
    "Glm4Moe": {**WIDE, **ROUTED},
    "GPTBigCode": GPT,
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GraniteMoe": {**SMALL, **LOCAL, **GRANITE},
    "GraniteMoeHybrid": {
        **SMALL,
        **LOCAL,
        **MAMBA,
        **GRANITE,
        "layer_types": ["mamba", "attention", "attention"],
        "shared_intermediate_size": 24,
    },
    "GraniteMoeShared": {**SMALL, **LOCAL, **GRANITE, "shared_intermediate_size": 24},
    "Helium": {**SMALL, "head_dim": 8},
    "HunYuanDenseV1": WIDE,
    "HunYuanMoEV1": {**WIDE, "num_experts": 4, "moe_topk": 2},
    "Jais2": SMALL,
    "Jamba": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "pad_token_id": 0,
    },
    "Lfm2": {**SMALL, **CONVOLUTIONS},
    "Lfm2Moe": {**SMALL, **CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1},
    "MiniMaxM2": {**WIDE, **LOCAL},
    "Ministral": {**WIDE, **ALTERNATING},
    "Ministral3": WIDE,
    "NanoChat": SMALL,
    "Nemotron": SMALL,
    "Olmo": SMALL,
    "Olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "OPT": OPT,
    "Persimmon": {**SMALL, "rope_parameters": HALF_ROTARY},
    "Phi": {**SMALL, "rope_parameters": HALF_ROTARY},
    "Phimoe": {**SMALL, **LOCAL},
    "Qwen2Moe": {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3_5Text": {
        **WIDE,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "SeedOss": WIDE,
    "SolarOpen": {**WIDE, **ROUTED},
    "StableLm": {**SMALL, "rope_parameters": HALF_ROTARY},
    "Starcoder2": SMALL,
    "VaultGemma": {**WIDE, **ALTERNATING, "query_pre_attn_scalar": 12},
    "Youtu": {**SMALL, **LATENT},
}

# the way from the heads to the logit is more than norms and factors, or attention cannot be recorded
REFUSED: dict[str, dict[str, Any]] = {
    "Bert": BERT,
    "Bloom": GPT | {"hidden_size": 32},
    "DiffLlama": SMALL,
    "Doge": SMALL,
    "Dory": WIDE,
    "Falcon": FEW,
    "FalconH1": {**WIDE, **MAMBA, "mamba_d_ssm": 64},
    "GPTNeo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    },
    "GPTNeoXJapanese": FEW,
    "Kosmos2Text": {
        "vocab_size": VOCABULARY,
        "embed_dim": 32,
        "ffn_dim": 40,
        "layers": 2,
        "attention_heads": 4,
        "dropout": 0.0,
    },
    "LongcatFlash": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_hidden_size": 40,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 2,
    },
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "Mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "state_size": 8,
    },
    "MiniMax": {
        **WIDE,
        **LOCAL,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "block_size": 8,
    },
    "ModernBertDecoder": {**FEW, "intermediate_size": 40, "local_attention": WINDOW}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "Mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "RecurrentGemma": {**SMALL, "attention_window_size": WINDOW},
    "Roberta": BERT,
    "Rwkv": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "XGLM": {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4},
}

NO_SDPA = {"VaultGemma"}
# in older releases they compute attention themselves, and would be refused
SINCE_LATER = {
    "CodeGen": "transformers.models.codegen.modeling_codegen",
    "GPTJ": "transformers.models.gptj.modeling_gptj",
}
OUTSIDE_AUTO = {"Kosmos2Text": "transformers.models.kosmos2.modeling_kosmos2"}  # no AutoModelForCausalLM finds them


def known(names: dict[str, dict[str, Any]]) -> list[str]:
    """Those that the installed transformers has, and has on its attention interface."""
    there = [name for name in names if hasattr(transformers, f"{name}Config")]
    return [name for name in there if name not in SINCE_LATER or _on_the_interface(SINCE_LATER[name])]


def _on_the_interface(module: str) -> bool:
    return hasattr(importlib.import_module(module), "ALL_ATTENTION_FUNCTIONS")


def build(name: str, attention: str | None = None, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of this class, in evaluation mode; with sdpa where it has that and nothing else is asked for."""
    torch.manual_seed(0)  # what transformers draws is only rounded by us
    config, settings = getattr(transformers, f"{name}Config"), (EXACT | REFUSED)[name]
    if name in REFUSED:
        if name in OUTSIDE_AUTO:
            kind = getattr(importlib.import_module(OUTSIDE_AUTO[name]), f"{name}ForCausalLM")
            return kind(config(**settings)).to(dtype).eval()
        return AutoModelForCausalLM.from_config(config(**settings), dtype=dtype).eval()
    attention = attention or ("eager" if name in NO_SDPA else "sdpa")
    return construct(Family(config, settings), attention, dtype=dtype)


def models() -> Iterator[PreTrainedModel]:
    """One of each, float32."""
    for name in known(EXACT | REFUSED):
        yield build(name)
