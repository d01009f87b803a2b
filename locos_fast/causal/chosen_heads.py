"""The heads that an ablation is told, sorted by layer and checked against the model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from locos_fast.models.architecture import AttentionLayer, attention_layers, head_count
from locos_fast.models.hidden_keys import HeadSets
from locos_fast.scoring.head_scores import Head

Heads = Iterable[Head] | Sequence[Iterable[Head]]
"""Heads for all rows of a batch, or a list of them for each row."""


def chosen_heads(model: PreTrainedModel, heads: Heads) -> tuple[dict[int, AttentionLayer], dict[int, HeadSets]]:
    """The model's attention layers by number, and layer number -> the heads chosen there: one set, or one for each row.

    Raises ValueError for no heads at all and for heads that the model does not have.
    """
    layers = {layer.number: layer for layer in attention_layers(model)}
    given = list(heads)
    each = bool(given) and all(_is_list_of_heads(entry) for entry in given)
    rows = [set(map(_head, row)) for row in (given if each else [given])]
    everyone = set().union(*rows)
    if not everyone:
        raise ValueError("heads: expected at least one (layer, head), got none")
    for number, head in sorted(everyone):
        count = head_count(layers[number]) if number in layers else 0
        if not 0 <= head < count:
            raise ValueError(f"heads: the model has no softmax-attention head ({number}, {head})")
    numbers = sorted({number for number, _ in everyone})
    return layers, {
        number: tuple(frozenset(head for layer, head in row if layer == number) for row in rows) for number in numbers
    }


def _is_list_of_heads(entry: Any) -> bool:
    """A row's list may be empty; a head is a pair of numbers."""
    return isinstance(entry, (list, tuple, set, frozenset)) and not any(hasattr(x, "__index__") for x in entry)


def _head(entry: Any) -> Head:
    try:
        layer, head = entry
        return operator.index(layer), operator.index(head)
    except (TypeError, ValueError) as error:
        raise ValueError(f"heads: expected (layer, head) pairs of whole numbers, got {entry!r}") from error
