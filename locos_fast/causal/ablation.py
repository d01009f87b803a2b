"""ablate(): silence heads while a model runs, to see whether they are the cause of what it answers."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.architecture import AttentionLayer, attention_layers, head_count

MODES = ("output-zero",)

Head = tuple[int, int]  # (layer, head), both 0-based


@contextlib.contextmanager
def ablate(model: PreTrainedModel, heads: Iterable[Head], *, mode: str = "output-zero") -> Iterator[None]:
    """Ablate `heads`, [(layer, head)], in every forward pass inside the context.

    mode "output-zero": the head's slice of the output projection's input is set to zero at every position, so the head
    writes nothing into the residual stream (the projection's bias stays). This removes a head; the published ablations
    that set its query to zero leave it writing the mean of the values.

    Raises ValueError for heads the model does not have and for unknown modes, UnsupportedModelError as `record` does.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    layers = {layer.number: layer for layer in attention_layers(model)}
    chosen: dict[int, set[int]] = defaultdict(set)
    for index, head in heads:
        count = head_count(layers[index]) if index in layers else 0
        if not 0 <= head < count:
            raise ValueError(f"heads: the model has no softmax-attention head ({index}, {head})")
        chosen[index].add(head)
    hooks = [
        layers[index].projection.register_forward_pre_hook(_silence(layers[index], sorted(of_layer)), with_kwargs=True)
        for index, of_layer in chosen.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_matched_heads(model: PreTrainedModel, heads: Iterable[Head], *, seed: int) -> list[Head]:
    """A control: as many random heads from each layer as `heads` has there, none of them in `heads`.

    Raises ValueError where a layer has too few other heads.
    """
    layers = {layer.number: layer for layer in attention_layers(model)}
    rng = random.Random(seed)
    chosen: dict[int, set[int]] = defaultdict(set)
    for index, head in heads:
        chosen[index].add(head)
    control: list[Head] = []
    for index, of_layer in sorted(chosen.items()):
        others = [head for head in range(head_count(layers[index])) if head not in of_layer]
        if len(others) < len(of_layer):
            raise ValueError(f"heads: layer {index} has {len(others)} other heads, too few to match {len(of_layer)}")
        control += [(index, head) for head in sorted(rng.sample(others, len(of_layer)))]
    return control


def _silence(layer: AttentionLayer, heads: list[int]) -> Callable:
    count = head_count(layer)

    def silenced(x: Tensor) -> Tensor:
        outputs = x.clone()
        outputs.unflatten(-1, (count, -1))[..., heads, :] = 0
        return outputs

    def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (silenced(args[0]), *args[1:]), kwargs
        name = next(name for name, x in kwargs.items() if isinstance(x, Tensor))
        return args, kwargs | {name: silenced(kwargs[name])}

    return pre_hook
