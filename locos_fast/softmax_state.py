"""Partial softmax results and the one function that merges them.

A part of the keys leaves, per row, the largest score, the sum of exp(score - largest) and any number of sums weighted
by that exponential. Two such states merge into the state of the union; the merge is associative, so keys may be cut
anywhere and the parts merged in any grouping. The empty state (nothing seen) is its neutral element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SoftmaxState(NamedTuple):
    """The state of a set of keys, for rows of any leading shape."""

    largest: Tensor  # (...) largest score, -inf if no key is visible
    argmax: Tensor  # (...) int64 slot of the largest score, -1 if no key is visible
    denominator: Tensor  # (...) sum of exp(score - largest)
    sums: Tensor  # (..., P) payload, each a sum of exp(score - largest) * something

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
    keep = (each.largest - reference).exp()
    first = (each.largest == largest).byte().argmax(0, keepdim=True)
    return SoftmaxState(
        largest,
        each.argmax.gather(0, first)[0],
        (each.denominator * keep).sum(0),
        (each.sums * keep[..., None]).sum(0),
    )


def normaliser(state: SoftmaxState, sinks: Tensor | None = None) -> Tensor:
    """Natural-log softmax normaliser; `sinks` broadcasts to the rows and enters the denominator only."""
    lse = state.largest + state.denominator.log()
    lse = torch.where(state.largest == -torch.inf, -torch.inf, lse)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse).expand_as(lse))


def weight(state: SoftmaxState, lse: Tensor) -> Tensor:
    """What turns the state's sums into sums weighted by alpha: exp(largest - lse), 0 for rows that see nothing."""
    return torch.where(state.largest == -torch.inf, 0.0, (state.largest - lse).exp())
