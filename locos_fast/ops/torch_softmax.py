"""Softmax over the keys block by block, in PyTorch.

Scores are in base 2 (natural ones times log2 e), as in the kernels: exp2 takes half the time of exp. Sums weighted by
exp2(score - reference), the reference being the largest score so far, become sums weighted by attention once all keys
are seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
CHUNK = 32  # scores whose maximum is taken first, vectorised, when the position of the largest is looked for
FEW = 1 / 8  # a CPU copies up to this share of the rows to search them alone; if more have a new largest score, all


class RunningLargest:
    """The largest score of every row so far, and its slot; rows of any shape."""

    def __init__(self, like: Tensor, lowest: float) -> None:
        """`like` has the rows' shape and the scores' dtype and device; scores up to `lowest` do not count."""
        self.score = torch.full_like(like, lowest)
        self.slot = torch.full(like.shape, -1, device=like.device)  # the first on ties

    def add(self, scores: Tensor, first_slot: int) -> None:
        """Take in the scores (..., n) of the next slots."""
        largest = scores.amax(-1)
        better = largest > self.score
        self.score = torch.maximum(self.score, largest)
        if scores.device.type == "cpu":
            rows = better.reshape(-1).nonzero().view(-1)
            if rows.numel() <= FEW * better.numel():
                if rows.numel():
                    found = scores.flatten(0, -2).index_select(0, rows).argmax(-1)
                    self.slot.view(-1).index_copy_(0, rows, found.add_(first_slot))
                return
        self.slot = torch.where(better, position_of_largest(scores).add_(first_slot), self.slot)

    def argmax(self) -> Tensor:
        """Slot of the largest score; -1 where no score counted, or one was NaN."""
        return torch.where(self.score.isnan(), -1, self.slot)


class RunningSoftmax:
    """What the keys seen so far leave of the softmax of every row; rows of any shape."""

    def __init__(self, like: Tensor, sinks: Tensor | None = None) -> None:
        """`like` has the rows' shape and the scores' dtype and device. `sinks`, natural, broadcasts to the rows and
        enters normaliser and weights only."""
        self.largest = RunningLargest(like, lowest(like.dtype))
        self.denominator = torch.zeros_like(like)  # sum of exp2(score - reference)
        self.sinks = None if sinks is None else sinks.to(like).expand_as(like)

    @property
    def reference(self) -> Tensor:
        """The largest score so far, `lowest` of a row that has seen nothing."""
        return self.largest.score

    def add(self, scores: Tensor, first_slot: int) -> tuple[Tensor, Tensor]:
        """Take in the scores (..., n) of the next slots, -inf where a row does not see a key.

        Returns exp2(scores - reference), written over `scores`, and the factor that makes sums taken so far relative to
        the new reference.
        """
        before = self.reference
        self.largest.add(scores, first_slot)
        keep = (before - self.reference).exp2_()
        exponentials = scores.sub_(self.reference.unsqueeze(-1)).exp2_()
        self.denominator.mul_(keep).add_(exponentials.sum(-1))
        return exponentials, keep

    def lse(self) -> Tensor:
        """Log-sum-exp, natural; -inf, or the sink itself, where nothing is seen."""
        lse = (self.reference + self.denominator.log2()) * LN_2
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks)
        return torch.where(self._unseen(), -torch.inf if self.sinks is None else self.sinks, lse)

    def to_alpha(self, reference: Tensor | None = None) -> Tensor:
        """What turns sums relative to `reference`, by default the one of now, into sums weighted by attention; 0 for
        rows that see nothing. By way of the normaliser it would lose digits where that is large."""
        denominator = self.denominator
        if self.sinks is not None:
            denominator = denominator + (self.sinks * LOG2_E - self.reference).exp2()
        factor = torch.where(self._unseen(), 0.0, 1 / denominator)
        return factor if reference is None else factor * (reference - self.reference).exp2()

    def _unseen(self) -> Tensor:
        return self.reference == lowest(self.reference.dtype)


def lowest(dtype: torch.dtype) -> float:
    """The reference of rows that have seen nothing: with -inf, (-inf) - (-inf) would be NaN."""
    return torch.finfo(dtype).min


def position_of_largest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`, the first on ties, four times as fast: PyTorch does not vectorise an argmax."""
    columns = scores.shape[-1]
    if columns % CHUNK:
        return scores.argmax(-1)
    chunk = scores.unflatten(-1, (columns // CHUNK, CHUNK)).amax(-1).argmax(-1)
    first = chunk.mul_(CHUNK)
    winner = scores.gather(-1, first[..., None] + torch.arange(CHUNK, device=scores.device))
    return first.add_(winner.argmax(-1))
