"""Models of published geometry with random weights, made on the device: nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

MAX_POSITIONS = 131_072


class Shape(NamedTuple):
    """The sizes of a Qwen3 model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def config(self) -> dict[str, int | str]:
        """As it is written to the results file."""
        return self._asdict() | {"name": self.name, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, config: dict) -> Shape:
        sizes = {name: config[name] for name in cls._fields}
        return cls(**sizes | {"dtype": getattr(torch, config["dtype"])})


QWEN3_8B = Shape("Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, 151_936, torch.bfloat16)
# two layers of Qwen3-0.6B under a smaller vocabulary
CUT = Shape("Qwen3-0.6B, 2 layers", 2, 1024, 3072, 16, 8, 128, 32_768, torch.float32)
OF_DEVICE = {"cpu": CUT, "cuda": QWEN3_8B}


def build(shape: Shape, device: str, *, seed: int = 0) -> PreTrainedModel:
    """The model with normal weights of standard deviation 0.02; the random state outside is left as it was."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval()


def tokens(shape: Shape, length: int, device: str, *, seed: int = 0) -> torch.Tensor:
    """(1, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocabulary, (1, length), generator=generator).to(device)
