"""Sums over spans of keys in the one pass of the torch backend."""

from __future__ import annotations

import torch
from torch import Tensor

from locos_fast.ops.torch_softmax import RunningSoftmax, lowest
from locos_fast.ops.triton_spans import SpanPlan

SUMMED_AT_ONCE = 128  # columns per sum over spans: a matrix product adds one by one, and the rounding adds up


class RunningReference:
    """The score of each row to which sums over the blocks are relative."""

    def __init__(self, like: Tensor) -> None:
        self.score = torch.full_like(like, lowest(like.dtype))  # (B, Hkv, R)

    def move(self, score: Tensor, *sums: Tensor) -> None:
        """Make `sums` (B, Hkv, R, ...) relative to `score`. There may be many sums, so they are left alone where no row
        has a new one."""
        if not torch.equal(score, self.score):
            keep = (self.score - score).exp2()
            for each in sums:
                each *= keep.view(*keep.shape, *(1,) * (each.ndim - keep.ndim))
            self.score = score


class SpanSums:
    """Sums of fields over the columns of each span: tile by tile, touching only the columns and spans that meet."""

    def __init__(self, spans: Tensor, kv_offset: int, n_keys: int, like: Tensor, fields: int) -> None:
        """`like` (B, Hkv, R) has the rows' shape and the sums' dtype and device."""
        columns = (spans - kv_offset).cpu()
        self.plan = SpanPlan.of(columns, like.shape[0], n_keys, SUMMED_AT_ONCE, like.device)
        self.low, self.high = self.plan.low.amin(0).tolist(), self.plan.high.amax(0).tolist()
        self.sums = [like.new_zeros((*like.shape, self.plan.start.shape[1])) for _ in range(fields)]
        self.running = RunningReference(like)

    def reach(self, start: int, end: int) -> tuple[int, int]:
        """The columns of a block from the first to the last tile that a span meets; empty where none does."""
        met = self._met(start, end)
        if not met:
            return start, start
        return max(met[0] * SUMMED_AT_ONCE, start), min((met[-1] + 1) * SUMMED_AT_ONCE, end)

    def _met(self, start: int, end: int) -> list[int]:
        tiles = range(start // SUMMED_AT_ONCE, -(-end // SUMMED_AT_ONCE))
        return [tile for tile in tiles if self.low[tile] < self.high[tile]]

    def add(self, start: int, *fields: Tensor, reference: Tensor | None = None) -> None:
        """Add blocks (B, Hkv, R, n) whose first column is `start`; `reference` (B, Hkv, R) is the score that they are
        relative to, None if to none."""
        end = start + fields[0].shape[-1]
        met = self._met(start, end)
        if not met:
            return
        if reference is not None:
            self.running.move(reference, *self.sums)
        for tile in met:
            spans = slice(self.low[tile], self.high[tile])
            left, right = max(tile * SUMMED_AT_ONCE, start), min((tile + 1) * SUMMED_AT_ONCE, end)
            inside = self._inside(left, right, spans)
            for into, field in zip(self.sums, fields, strict=True):
                into[..., spans] += field[..., left - start : right - start] @ inside

    def _inside(self, left: int, right: int, spans: slice) -> Tensor:
        """(B, 1, right - left, spans): whether a column lies in a span."""
        column = torch.arange(left, right, device=self.plan.start.device)[:, None]
        start, end = (bound[:, None, spans] for bound in (self.plan.start, self.plan.end))
        return ((column >= start) & (column < end))[:, None].to(self.sums[0].dtype)

    def result(self, softmax: RunningSoftmax | None = None) -> list[Tensor]:
        """(B, Hkv, R, S) of each field, in the order the spans were given; weighted by attention where `softmax` is
        given."""
        factor = 1.0 if softmax is None else softmax.to_alpha(self.running.score)[..., None]
        return [self.plan.restore_order(each * factor) for each in self.sums]


class SpanOutputs:
    """Each span's share of the head output, from the exponentials of the one pass over the keys."""

    def __init__(self, spans: Tensor, kv_offset: int, like: Tensor, value: Tensor) -> None:
        """`like` (B, Hkv, R) has the rows' shape and the sums' dtype and device."""
        self.columns = spans - kv_offset  # (B or 1, S, 2)
        self.reach = list(
            zip(self.columns[..., 0].amin(0).tolist(), self.columns[..., 1].amax(0).tolist(), strict=True)
        )
        self.value = value
        self.mass = like.new_zeros((*like.shape, len(self.reach)))
        self.output = like.new_zeros((*like.shape, len(self.reach), value.shape[-1]))
        self.running = RunningReference(like)

    def add(self, start: int, exponentials: Tensor, reference: Tensor) -> None:
        """Add a block (B, Hkv, R, n) of exponentials relative to `reference` (B, Hkv, R), with first column `start`."""
        end = start + exponentials.shape[-1]
        met = [(index, low, high) for index, (low, high) in enumerate(self.reach) if low < end and high > start]
        if not met:
            return
        self.running.move(reference, self.mass, self.output)
        for index, low, high in met:
            left, right = max(low, start), min(high, end)
            column = torch.arange(left, right, device=self.columns.device)
            inside = (column >= self.columns[:, index, :1]) & (column < self.columns[:, index, 1:])  # (B or 1, n)
            weights = exponentials[..., left - start : right - start] * inside[:, None, None]
            self.mass[..., index] += weights.sum(-1)
            self.output[..., index, :] += weights @ self.value[:, :, left:right].to(weights.dtype)

    def result(self, softmax: RunningSoftmax) -> tuple[Tensor, Tensor]:
        """mass (B, Hkv, R, S) and output (B, Hkv, R, S, Dv), weighted by alpha."""
        to_alpha = softmax.to_alpha(self.running.score)[..., None]
        return self.mass * to_alpha, self.output * to_alpha[..., None]
