"""Controls for an ablation: other heads of the same layers, or of the nearest ones where a layer has too few."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel

from locos_fast.causal.ablation import Head
from locos_fast.models.architecture import attention_layers, head_count


class MatchedHeads(NamedTuple):
    """One draw of control heads."""

    heads: list[Head]
    borrowed: int  # how many of them are of a near layer, because their own had no other head left


def nearest_layer_heads(model: PreTrainedModel, heads: Iterable[Head], *, seed: int) -> MatchedHeads:
    """As many random heads from each layer as `heads` has there, none of them in `heads`; where a layer has too few
    others, the rest comes from the nearest layers that have some, of two equally near ones from the lower.

    Where every layer has enough this is a draw like those of `layer_matched_heads`.
    Raises ValueError if the model has too few other heads altogether.
    """
    wanted = set(heads)
    everywhere = [(layer.number, head) for layer in attention_layers(model) for head in range(head_count(layer))]
    others = [head for head in everywhere if head not in wanted]
    if len(others) < len(wanted):
        raise ValueError(f"heads: the model has {len(others)} other heads, too few to match {len(wanted)}")
    rng = random.Random(seed)
    rng.shuffle(others)
    chosen: list[Head] = []
    unmatched = []
    for layer, _ in sorted(wanted):
        own = next((head for head in others if head[0] == layer), None)
        if own is None:
            unmatched.append(layer)
        else:
            others.remove(own)
            chosen.append(own)
    for layer in unmatched:
        near = min(others, key=lambda head: (abs(head[0] - layer), head[0]))
        others.remove(near)
        chosen.append(near)
    return MatchedHeads(sorted(chosen), len(unmatched))
