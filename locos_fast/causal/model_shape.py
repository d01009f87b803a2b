"""The shape of a model, as far as sets of its heads are concerned: layers, query heads and the KV groups they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from locos_fast.models.architecture import attention_layers, head_count, layer_count
from locos_fast.scoring.head_scores import Head

KVGroup = tuple[int, int]  # (layer, KV head)


class ModelShape(NamedTuple):
    """Layers are numbered as the model counts them, from 0; those without softmax attention have no heads."""

    layers: int  # all, with softmax attention or without
    heads: dict[int, int]  # layer -> its query heads, in layer order
    kv_heads: dict[int, int]  # layer -> its KV heads

    @classmethod
    def uniform(cls, layers: int, heads: int, kv_heads: int | None = None) -> ModelShape:
        """All layers alike; without `kv_heads` every head has keys and values of its own."""
        numbers = range(layers)
        return cls(layers, dict.fromkeys(numbers, heads), dict.fromkeys(numbers, kv_heads or heads))

    @property
    def score_shape(self) -> tuple[int, int]:
        """(layers, heads) of the arrays of `HeadScores`."""
        return self.layers, max(self.heads.values())

    def every_head(self) -> list[Head]:
        """In order of layer and head."""
        return [(layer, head) for layer, count in self.heads.items() for head in range(count)]

    def kv_group(self, head: Head) -> KVGroup:
        """The KV head that a query head reads."""
        layer, number = head
        return layer, number // (self.heads[layer] // self.kv_heads[layer])

    def __str__(self) -> str:
        """ "30 layers of 9 heads"."""
        counts = sorted(set(self.heads.values()))
        return f"{self.layers} layers of {' or '.join(map(str, counts))} heads"


def model_shape(model: PreTrainedModel | ModelShape) -> ModelShape:
    """The shape of a model; of a shape, itself. Raises UnsupportedModelError as `record` does."""
    if isinstance(model, ModelShape):
        return model
    layers = attention_layers(model)
    heads = {layer.number: head_count(layer) for layer in layers}
    # what transformers' attention functions read to repeat keys; without it every head has its own
    sharing = {layer.number: getattr(layer.module, "num_key_value_groups", 1) for layer in layers}
    return ModelShape(layer_count(model), heads, {layer: count // sharing[layer] for layer, count in heads.items()})


def check_heads(model: PreTrainedModel | ModelShape, heads: Iterable[Head]) -> list[Head]:
    """`heads` as a list, which names at least one head, each once, and none that the model does not have.

    Raises ValueError for anything else.
    """
    shape = model_shape(model)
    chosen = [_pair(head) for head in heads]
    if not chosen:
        raise ValueError("heads: expected at least one head, got none")
    for layer, head in chosen:
        if 0 <= layer < shape.layers and layer not in shape.heads:
            raise ValueError(f"heads: {layer}-{head}: layer {layer} of the model has no softmax attention")
        if not 0 <= head < shape.heads.get(layer, 0):
            raise ValueError(
                f"heads: the model has no softmax-attention head {layer}-{head}; it has {shape}, from 0 on"
            )
    refuse_repeated(chosen)
    return chosen


def refuse_repeated(heads: Sequence[Head]) -> None:
    """Raises ValueError for a head that is named twice."""
    for (layer, head), times in Counter(heads).items():
        if times > 1:
            raise ValueError(f"heads: {layer}-{head} is named twice")


def _pair(head: object) -> Head:
    if isinstance(head, tuple | list) and len(head) == 2:
        layer, number = head
        if type(layer) is int and type(number) is int:
            return layer, number
    raise ValueError(f"heads: expected (layer, head), two whole numbers, got {head!r}")
