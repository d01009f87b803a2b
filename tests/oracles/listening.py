"""Listen to a model's attention functions and output projections, without the recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from locos_fast.models.architecture import attention_layers
from locos_fast.models.attention_registry import eager_attention


def registry() -> list[tuple[str, Callable]]:
    return list(AttentionInterface._global_mapping.items())


class Call(NamedTuple):
    """What one layer's attention was given and gave back in the last forward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    output: Tensor  # (B, N, H, Dv)
    weights: Tensor | None


@contextmanager
def attention_calls(model: PreTrainedModel) -> Iterator[dict[int, Call]]:
    """Listen to the model's attention function. Entered outside `record`, it is what `record` wraps."""
    calls: dict[int, Call] = {}
    name = model.config._attn_implementation
    before = AttentionInterface._global_mapping.get(name)
    implementation = before or eager_attention(attention_layers(model)[0].module)

    def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
        result = implementation(module, query, key, value, mask, **kwargs)
        calls[module.layer_idx] = Call(query, key, value, mask, *result[:2])
        return result

    AttentionInterface.register(name, listen)
    try:
        yield calls
    finally:
        if before is None:
            del AttentionInterface._global_mapping[name]
        else:
            AttentionInterface.register(name, before)


@contextmanager
def projection_inputs(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> what the output projection was given, (B, N, heads * Dv)."""
    inputs: dict[int, Tensor] = {}
    hooks = [
        layer.projection.register_forward_pre_hook(
            lambda _, args, number=layer.number: inputs.update({number: args[0]})
        )
        for layer in attention_layers(model)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
