"""A model in a few words, for what is written beside results, and what tells it from every other one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast._version import __version__

ELEMENTS = 1 << 20  # of a tensor that are added up at a time
PRIME = 65521
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes
NOT_OF_A_MODEL = ("transformers_version", "dtype", "torch_dtype", "attn_implementation")  # but of how it was loaded


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


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """What the model computes, wherever it lies: the same on every device and from every folder.

    weights       the commit on the Hub that it was loaded from, else a digest of all weights in memory
    architecture  a digest of its configuration, without paths and versions
    """
    commit = getattr(model.config, "_commit_hash", None)
    return {
        "weights": f"commit {commit}" if commit else f"digest {_digest(_weights(model))}",
        "architecture": _digest([json.dumps(_lasting(model.config.to_diff_dict()), sort_keys=True, default=str)]),
    }


def _digest(parts: Iterator[str] | list[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() + b"\n")
    return found.hexdigest()[:16]


def _lasting(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    kept = {str(name): value for name, value in config.items() if name not in NOT_OF_A_MODEL}
    return {name: _lasting(value) for name, value in kept.items() if not name.startswith("_")}


def _weights(model: nn.Module) -> Iterator[str]:
    for name, tensor in model.named_parameters():
        yield f"{name} {_contents(tensor.detach())}"
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name} {_contents(buffer)}"


def _contents(tensor: Tensor) -> str:
    """Shape, dtype and a checksum of the bits, weighted by position: integers, so that no order of adding matters."""
    described = f"{tuple(tensor.shape)} {tensor.dtype}"
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised tensor, made up of others
        names, _ = tensor.__tensor_flatten__()
        return " ".join([described, *(f"{name} {_contents(getattr(tensor, name))}" for name in names)])
    if tensor.is_meta:  # offloaded: nothing of it is at hand
        return described
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(INTEGERS[tensor.element_size()]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), ELEMENTS):
        part = bits[start : start + ELEMENTS].to(torch.int64)
        places = torch.arange(start, start + len(part), dtype=torch.int64, device=tensor.device)
        total += (part * (places * 31 % PRIME + 1)).sum()
    return f"{described} {int(total)}"
