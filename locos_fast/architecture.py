"""Where a Hugging Face causal language model keeps what this library needs: decoder, attention layers, unembedding.

Everything is found by inspecting modules, not by model name. A model that cannot be recorded is refused here, in one
sentence that names the module.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")


class UnsupportedModelError(ValueError):
    """The model computes attention in a way that cannot be recorded, or runs in a mode that hides it."""


class AttentionLayer(NamedTuple):
    """One softmax-attention layer of the decoder."""

    index: int  # 0-based layer number of the model
    module: nn.Module  # the attention module that calls transformers' attention interface
    projection: nn.Module  # maps the concatenated head outputs (heads * Dv) to the residual stream


def decoder(model: nn.Module) -> nn.Module:
    """The text decoder: the module that takes token embeddings through all layers."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def layer_count(model: nn.Module) -> int:
    """Number of decoder layers, attention or not."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """All softmax self-attention layers in layer order.

    Raises UnsupportedModelError for models without any, for attention that bypasses transformers' attention interface,
    and for models that are compiled or tensor-parallel.
    """
    _refuse_mode(model)
    layers = [
        AttentionLayer(module.layer_idx, module, _projection(module))
        for module in decoder(model).modules()
        if _is_self_attention(module)
    ]
    if not layers:
        raise UnsupportedModelError(f"{_name(model)} has no softmax attention layers to record")
    layers.sort(key=lambda layer: layer.index)
    indices = [layer.index for layer in layers]
    if len(set(indices)) != len(indices):
        raise UnsupportedModelError(f"{_name(model)} has several attention modules in one layer")
    for layer in layers:
        if "ALL_ATTENTION_FUNCTIONS" not in forward_globals(layer.module):
            raise UnsupportedModelError(
                f"{_name(model)} cannot be recorded: {_name(layer.module)} computes attention itself "
                "instead of calling transformers' attention interface"
            )
    return layers


def unembedding(model: nn.Module) -> nn.Module:
    """The module that maps the residual stream to logits."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise UnsupportedModelError(f"{_name(model)} has no output embeddings to read answer directions from")
    return module


def forward_globals(module: nn.Module) -> dict:
    """The global names of the source file in which the module's forward is written."""
    return inspect.unwrap(type(module).forward).__globals__


def _is_self_attention(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
        and not getattr(module, "is_cross_attention", False)
        and _find_projection(module) is not None
    )


def _find_projection(module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in OUTPUT_PROJECTIONS if name in children), None)


def _projection(module: nn.Module) -> nn.Module:
    projection = _find_projection(module)
    assert projection is not None  # _is_self_attention looked
    return projection


def _refuse_mode(model: nn.Module) -> None:
    if type(model).__name__ == "OptimizedModule" or any(m._compiled_call_impl is not None for m in model.modules()):
        raise UnsupportedModelError("compiled models cannot be recorded; pass the model as it was before torch.compile")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise UnsupportedModelError(f"{_name(model)} is tensor-parallel, which cannot be recorded; use a device_map")
    for name, parameter in model.named_parameters():
        if parameter.device == torch.device("meta"):
            raise UnsupportedModelError(f"{_name(model)} has weights on the meta device ({name}); load them first")


def _name(module: nn.Module) -> str:
    return type(module).__name__
