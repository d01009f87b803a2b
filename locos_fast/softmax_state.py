"""Partial softmax results and the one function that merges them.

Scores are in base 2 (natural ones times log2 e), as in the kernels: exp2 takes half the time of exp. A part of the keys
leaves, per row, the largest score, the sum of exp2(score - largest) and any number of sums weighted by that
exponential. Two such states merge into the state of the union; the merge is associative, so keys may be cut anywhere
and the parts merged in any grouping. The empty state (nothing seen) is its neutral element.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class SoftmaxState(NamedTuple):
    """The state of a set of keys, for rows of any leading shape."""

    largest: Tensor  # (...) largest score, -inf if no key is visible
    argmax: Tensor  # (...) int64 slot of the largest score, -1 if no key is visible
    denominator: Tensor  # (...) sum of exp2(score - largest)
    sums: Tensor  # (..., P) payload, each a sum of exp2(score - largest) * something

    @classmethod
    def empty(cls, rows: torch.Size, payload: int, like: Tensor) -> SoftmaxState:
        return cls(
            like.new_full(rows, -torch.inf),
            torch.full(rows, -1, dtype=torch.int64, device=like.device),
            like.new_zeros(rows),
            like.new_zeros((*rows, payload)),
        )


def merge(*states: SoftmaxState) -> SoftmaxState:
    """The state of the keys of all `states` together; on a tie the slot of the first is kept."""
    each = SoftmaxState(*map(torch.stack, zip(*states, strict=True)))  # (states, ...)
    largest = each.largest.amax(0)
    reference = torch.where(largest == -torch.inf, 0.0, largest)  # two empty states: (-inf) - (-inf) would be NaN
    keep = (each.largest - reference).exp2()
    first = (each.largest == largest).byte().argmax(0, keepdim=True)
    return SoftmaxState(
        largest,
        each.argmax.gather(0, first)[0],
        (each.denominator * keep).sum(0),
        (each.sums * keep[..., None]).sum(0),
    )


def normaliser(state: SoftmaxState, sinks: Tensor | None = None) -> Tensor:
    """Softmax normaliser, in base 2 like the scores; `sinks` broadcasts to the rows and enters the denominator only."""
    lse = state.largest + state.denominator.log2()
    lse = torch.where(state.largest == -torch.inf, -torch.inf, lse)
    return lse if sinks is None else torch.logaddexp2(lse, sinks.to(lse).expand_as(lse))


def weight(largest: Tensor, lse: Tensor) -> Tensor:
    """What turns sums relative to `largest` into sums weighted by alpha; 0 for rows that see nothing."""
    return torch.where(largest == -torch.inf, 0.0, (largest - lse).exp2())
