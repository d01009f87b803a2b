"""Partial results of a pass over the keys, and the launches that combine them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.kernels import tiles
from locos_fast.kernels.combine import combine_splits
from locos_fast.kernels.ov_contribution import combine_sums
from locos_fast.kernels.spans import combine_spans
from locos_fast.ops.triton_grid import Grid
from locos_fast.ops.triton_spans import SpanPlan

COMBINED_AT_ONCE = 16  # partial results a combining program loads together


class Splits(NamedTuple):
    """Partial results of the splits, (B * Hkv, splits, rows)."""

    largest: Tensor
    denominator: Tensor  # of given weights: their sum
    total: Tensor
    column: Tensor

    @classmethod
    def allocate(cls, grid: Grid, device: torch.device, *, sums: int) -> Splits:
        """`sums` is 3, or 2 where nothing is projected: then the total is the denominator, and nobody reads it."""
        shape = (grid.batch * grid.kv_heads, grid.splits, grid.rows)
        floats = torch.empty((sums, *shape), dtype=torch.float32, device=device)
        return cls(floats[0], floats[1], floats[-1], torch.empty(shape, dtype=torch.int32, device=device))


class Pairs(NamedTuple):
    """Partial results of the (span, tile) pairs, (pairs, Hkv, rows)."""

    largest: Tensor
    mass: Tensor
    phi: Tensor

    @classmethod
    def allocate(cls, grid: Grid, pairs: int, device: torch.device) -> Pairs:
        return cls(*torch.empty((3, pairs, grid.kv_heads, grid.rows), dtype=torch.float32, device=device))


class Rows(NamedTuple):
    """Softmax statistics of every row: what `combine_splits` writes."""

    largest: Tensor  # (B * Hkv, rows) base 2, padding rows included
    inverse: Tensor  # (B * Hkv, rows)
    lse: Tensor  # (B, H, T) and so on
    total_mass: Tensor
    total: Tensor
    argmax: Tensor


class Sums(NamedTuple):
    """Sums over all keys from given weights: what `combine_sums` writes, (B, H, T) each."""

    total_mass: Tensor
    total: Tensor
    argmax: Tensor


def softmax_rows(splits: Splits, kv_offset: int, sinks: Tensor | None, grid: Grid) -> Rows:
    """Launch `combine_splits`."""
    device = splits.largest.device
    shape = (grid.batch, grid.kv_heads * grid.group, grid.steps)
    largest, inverse = torch.empty((2, grid.batch * grid.kv_heads, grid.rows), dtype=torch.float32, device=device)
    lse, total_mass, total = torch.empty((3, *shape), dtype=torch.float32, device=device)
    rows = Rows(largest, inverse, lse, total_mass, total, torch.empty(shape, dtype=torch.int64, device=device))
    combine_splits[grid.combining](
        *splits,
        lse if sinks is None else sinks.contiguous(),  # never read without sinks
        *rows,
        grid.splits,
        grid.steps,
        grid.kv_heads,
        kv_offset,
        GROUP=grid.group,
        SINKS=sinks is not None,
        BLOCK_M=tiles.COMBINED_ROWS,
        BLOCK_S=COMBINED_AT_ONCE,
        **tiles.FUSED_MULTIPLY_ADD,
    )
    return rows


def weight_sums(splits: Splits, grid: Grid) -> Sums:
    """Launch `combine_sums`."""
    device = splits.largest.device
    shape = (grid.batch, grid.kv_heads * grid.group, grid.steps)
    total_mass, total = torch.empty((2, *shape), dtype=torch.float32, device=device)
    sums = Sums(total_mass, total, torch.empty(shape, dtype=torch.int64, device=device))
    combine_sums[grid.combining](
        *splits,
        *sums,
        grid.splits,
        grid.steps,
        GROUP=grid.group,
        BLOCK_M=tiles.COMBINED_ROWS,
        BLOCK_S=COMBINED_AT_ONCE,
        **tiles.FUSED_MULTIPLY_ADD,
    )
    return sums


def span_sums(plan: SpanPlan, pairs: Pairs, rows: Rows | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """mass and span, (B, H, T, S); `rows` is None where the weights are already attention weights."""
    n_spans = plan.start.shape[1]
    shape = (2, grid.batch, grid.kv_heads * grid.group, grid.steps, n_spans)
    mass, span = torch.empty(shape, dtype=torch.float32, device=pairs.mass.device)
    combine_spans[n_spans, *grid.combining](
        plan.start,
        plan.end,
        plan.pair,
        *pairs,
        mass if rows is None else rows.largest,  # never read without a softmax
        mass if rows is None else rows.inverse,
        mass,
        span,
        grid.steps,
        n_spans,
        grid.kv_heads,
        grid.tile.block_n,
        GROUP=grid.group,
        SOFTMAX=rows is not None,
        BLOCK_M=tiles.COMBINED_ROWS,
        BLOCK_T=COMBINED_AT_ONCE,
        **tiles.FUSED_MULTIPLY_ADD,
    )
    return plan.restore_order(mass), plan.restore_order(span)
