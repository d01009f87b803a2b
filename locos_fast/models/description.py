"""A model in a few words, for what is written beside results."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from locos_fast._version import __version__


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Model, dtype, attention implementation and library versions, for the `meta` of scores."""
    parameter = next(model.parameters())
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "attn_implementation": model.config.get_text_config(decoder=True)._attn_implementation,
        "versions": {
            "locos_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
