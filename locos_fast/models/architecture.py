"""Where a Hugging Face causal language model keeps what this library needs: decoder, attention layers, unembedding.

Everything is found by inspecting modules, not by model name. A model that cannot be recorded is refused here, in one
sentence that names the module.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "proj")


class UnsupportedModelError(ValueError):
    """The model computes attention in a way that cannot be recorded, or runs in a mode that hides it."""


class AttentionLayer(NamedTuple):
    """One softmax-attention layer of the decoder."""

    number: int  # 0-based, as the model counts its layers
    module: Any  # nn.Module: the attention module that calls transformers' attention interface
    projection: nn.Module  # maps the concatenated head outputs (heads * Dv) to the residual stream


def decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder: the module that owns the list of layers and takes token embeddings through it."""
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    for within in (root, model):  # what a model calls its decoder may be its unembedding (ModernBERT)
        for module in within.modules():
            if any(_holds_layers(child) for child in module.children()):
                return module
    return root


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, attention or not. Raises UnsupportedModelError if it keeps them in no module list."""
    for child in decoder(model).children():
        if isinstance(child, nn.ModuleList) and _holds_layers(child):
            return child
    raise UnsupportedModelError(f"{_name(model)} keeps its layers in no module list")


def _holds_layers(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(
        _is_self_attention(inner) for layer in module for inner in layer.modules()
    )


def layer_count(model: PreTrainedModel) -> int:
    """Number of decoder layers, attention or not."""
    return len(decoder_layers(model))


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """All softmax self-attention layers in layer order.

    Raises UnsupportedModelError for models without any, for attention that bypasses transformers' attention interface,
    and for models that are compiled, wrapped (PEFT), tensor-parallel, or in training mode with dropout.
    """
    _refuse_mode(model)
    found = [module for module in decoder(model).modules() if _is_self_attention(module)]
    layers = [_attention_layer(module) for module in found if _calls_interface(module)]
    if found and not layers:
        raise UnsupportedModelError(_computes_itself(model, found[0]))
    if not layers:
        raise UnsupportedModelError(_without_layers(model))
    layers.sort(key=lambda layer: layer.number)
    numbers = [layer.number for layer in layers]
    if len(set(numbers)) != len(numbers):
        raise UnsupportedModelError(f"{_name(model)} has several attention modules in one layer")
    return layers


def _without_layers(model: PreTrainedModel) -> str:
    """Why no layer of a model was found."""
    for module in model.modules():
        projected = _find_projection(module) is not None
        if _calls_interface(module):
            missing = "is not known as an attention layer" if projected else "keeps its output projection elsewhere"
            return (
                f"{_name(model)} cannot be recorded: {_name(module)} calls transformers' attention interface, but "
                f"{missing}"
            )
        if "attention" in _name(module).lower() and projected:
            return _computes_itself(model, module)
    return f"{_name(model)} has no softmax attention layers to record"


def _computes_itself(model: PreTrainedModel, module: nn.Module) -> str:
    return (
        f"{_name(model)} cannot be recorded: {_name(module)} computes attention itself "
        "instead of calling transformers' attention interface"
    )


def head_count(layer: AttentionLayer) -> int:
    """Number of query heads of an attention layer; layers of one model may differ."""
    own = getattr(layer.module, "num_heads", None)
    if isinstance(own, int):
        return own
    config = layer.module.config
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer.number]
    return int(config.num_attention_heads)


def unembedding(model: PreTrainedModel) -> nn.Module:
    """The module that maps the residual stream to logits."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise UnsupportedModelError(f"{_name(model)} has no output embeddings to read answer directions from")
    return module


def forward_globals(module: nn.Module) -> dict:
    """The global names of the source file in which the module's forward is written."""
    return inspect.unwrap(type(module).forward).__globals__


def _calls_interface(module: nn.Module) -> bool:
    """Linear attention and hand-written attention do not, also where a softmax layer in the same file does."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


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


def _attention_layer(module: Any) -> AttentionLayer:
    projection = _find_projection(module)
    assert projection is not None  # _is_self_attention looked
    return AttentionLayer(module.layer_idx, module, projection)


def _refuse_mode(model: PreTrainedModel) -> None:
    for module in model.modules():
        if _is_compiled(module):
            raise UnsupportedModelError(
                f"{_name(getattr(module, '_orig_mod', module))} is compiled, which cannot be recorded; "
                "pass the model as it was before torch.compile"
            )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{_name(model)} is no transformers model; pass the one inside (of a PEFT model: model.get_base_model())"
        )
    for module in decoder(model).modules():
        if module.training and _dropout(module) > 0:
            name = next(name for name, of_that_name in decoder(model).named_modules() if of_that_name is module)
            raise UnsupportedModelError(
                f"{_name(model)} is in training mode and {name} applies dropout; call model.eval() before recording"
            )
    own = [
        parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None
    ]
    if any(type(parameter).__name__ == "DTensor" for parameter in own):
        raise UnsupportedModelError(f"{_name(model)} is tensor-parallel, which cannot be recorded; use a device_map")
    if any(parameter.is_meta for parameter in own):
        name = next(name for name, parameter in model.named_parameters() if parameter.is_meta)
        raise UnsupportedModelError(f"{_name(model)} has weights on the meta device ({name}); load them first")


def _dropout(module: nn.Module) -> float:
    """The probability of a dropout module, or of a dropout that a module applies as a function."""
    share = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
    return float(share) if isinstance(share, int | float) else 0.0


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), module.compile() or module.forward = torch.compile(module.forward)."""
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return True
    forward = vars(module).get("forward")
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)


def _name(module: nn.Module) -> str:
    return type(module).__name__
