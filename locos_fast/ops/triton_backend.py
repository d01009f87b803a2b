"""Launches the Triton kernels: chooses the tile, plans the spans, allocates the partial results. No host
synchronisation."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.kernels import tiles
from locos_fast.kernels.attention_contribution import attention_contribution_split
from locos_fast.kernels.attention_summary import attention_summary_split, span_output
from locos_fast.kernels.combine import combine_splits
from locos_fast.kernels.ov_contribution import combine_sums, ov_contribution_split
from locos_fast.kernels.spans import combine_spans
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.triton_spans import SpanPlan, on_device, span_columns
from locos_fast.ops.visibility import KeyCounts, Visibility, count_keys, count_span_visible

COMBINED_AT_ONCE = 16  # partial results a combining program loads together


@lru_cache
def _architecture(device: torch.device) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    amd = torch.version.hip is not None
    return tiles.architecture(*torch.cuda.get_device_capability(device), amd=amd)


class Grid(NamedTuple):
    """How rows and keys are cut into programs."""

    arch: str
    tile: tiles.Tile
    block_m: int
    row_blocks: int
    splits: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Grid:
        arch = _architecture(query.device)
        tile = tiles.select(arch, query.element_size(), key.shape[-1], value.shape[-1])
        rows = query.shape[1] // key.shape[1] * query.shape[2]
        block_m = tile.rows(rows)
        return cls(arch, tile, block_m, -(-rows // block_m), -(-key.shape[2] // tiles.SPLIT))

    @property
    def rows(self) -> int:
        return self.row_blocks * self.block_m


class Partials(NamedTuple):
    """Partial results of the splits, (B * Hkv, splits, rows), and of the (span, tile) pairs, (pairs, Hkv, rows)."""

    largest: Tensor
    denominator: Tensor
    total: Tensor
    column: Tensor
    pair_largest: Tensor
    pair_mass: Tensor
    pair_phi: Tensor

    @classmethod
    def allocate(cls, grid: Grid, kv: int, pairs: int, kv_heads: int, device: torch.device) -> Partials:
        largest, denominator, total = torch.empty((3, kv, grid.splits, grid.rows), dtype=torch.float32, device=device)
        column = torch.empty((kv, grid.splits, grid.rows), dtype=torch.int32, device=device)
        mass, phi = torch.empty((2, pairs, kv_heads, grid.rows), dtype=torch.float32, device=device)
        unwritten = torch.full((pairs, kv_heads, grid.rows), -torch.inf, dtype=torch.float32, device=device)
        return cls(largest, denominator, total, column, unwritten, mass, phi)


class Rows(NamedTuple):
    """Softmax statistics of every row: what `combine_splits` writes."""

    largest: Tensor  # (B * Hkv, rows) base 2, padding rows included
    inverse: Tensor  # (B * Hkv, rows)
    lse: Tensor  # (B, H, T) and so on
    total_mass: Tensor
    total: Tensor
    argmax: Tensor


def _combine_splits(
    partials: tuple[Tensor, Tensor, Tensor, Tensor],
    query: Tensor,
    kv_heads: int,
    kv_offset: int,
    sinks: Tensor | None,
    grid: Grid,
    *,
    with_total: bool,
) -> Rows:
    batch, heads, steps = query.shape[:3]
    largest, inverse = torch.empty((2, batch * kv_heads, grid.rows), dtype=torch.float32, device=query.device)
    lse, total_mass, total = torch.empty((3, batch, heads, steps), dtype=torch.float32, device=query.device)
    argmax = torch.empty((batch, heads, steps), dtype=torch.int64, device=query.device)
    combine_splits[grid.row_blocks, batch * kv_heads](
        *partials,
        lse if sinks is None else sinks.contiguous(),  # never read without sinks
        largest,
        inverse,
        lse,
        total_mass,
        total,
        argmax,
        grid.splits,
        steps,
        kv_heads,
        kv_offset,
        GROUP=heads // kv_heads,
        SINKS=sinks is not None,
        TOTAL=with_total,
        BLOCK_M=grid.block_m,
        BLOCK_S=COMBINED_AT_ONCE,
    )
    return Rows(largest, inverse, lse, total_mass, total, argmax)


def _combine_spans(
    plan: SpanPlan, partials: Partials, rows: Rows | None, like: Tensor, kv_heads: int, grid: Grid
) -> tuple[Tensor, Tensor]:
    """mass and span, (B, H, T, S); `rows` is None where the weights are already attention weights."""
    batch, heads, steps = like.shape[:3]
    n_spans = plan.start.shape[1]
    mass, span = torch.empty((2, batch, heads, steps, n_spans), dtype=torch.float32, device=like.device)
    combine_spans[n_spans, grid.row_blocks, batch * kv_heads](
        plan.start,
        plan.end,
        plan.pair,
        partials.pair_largest,
        partials.pair_mass,
        partials.pair_phi,
        mass if rows is None else rows.largest,  # never read without a softmax
        mass if rows is None else rows.inverse,
        mass,
        span,
        steps,
        n_spans,
        kv_heads,
        GROUP=heads // kv_heads,
        SOFTMAX=rows is not None,
        BLOCK_M=grid.block_m,
        BLOCK_N=grid.tile.block_n,
        BLOCK_T=COMBINED_AT_ONCE,
    )
    return plan.restore_order(mass), plan.restore_order(span)


class Attention(NamedTuple):
    """The arguments that both attention kernels share."""

    bounds: tuple[Tensor, Tensor, Tensor]  # first, last (B, T) and the holes
    hole_stride: int
    holes: bool
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, query: Tensor, visibility: Visibility, scale: float, softcap: float | None) -> Attention:
        shape = (query.shape[0], query.shape[2])
        first, last = (bound.expand(shape).contiguous() for bound in (visibility.first, visibility.last))
        holes = visibility.key_mask
        if holes is None:
            return cls((first, last, first), 0, False, scale, softcap)
        holes = holes.contiguous().view(torch.uint8)
        return cls((first, last, holes), holes.stride(0), True, scale, softcap)

    @property
    def scalars(self) -> tuple[float, float]:
        return self.scale, self.softcap or 0.0

    @property
    def flags(self) -> dict[str, bool]:
        return {"SOFTCAP": self.softcap is not None, "HOLES": self.holes}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on the tensors' own GPU, which under a device map is not always the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _readable(tensor: Tensor) -> Tensor:
    """The kernels read any strides in place but the last; a transposed head_dim is copied."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def attention_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    direction: Tensor,
    spans: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    counts: KeyCounts | None = None,
) -> Contributions:
    """`locos_fast.ops.attention_contribution` by `kernels/attention_contribution.py`."""
    query, key, value, direction = map(_readable, (query, key, value, direction))
    batch, heads, steps, head_dim = query.shape
    kv_heads, n_keys, value_dim = value.shape[1:]
    grid = Grid.of(query, key, value)
    plan = SpanPlan.of(spans - visibility.kv_offset, batch, n_keys, grid.tile.block_n, query.device)
    counts = counts or count_keys(visibility, on_device(spans, query.device), batch, n_keys)
    attention = Attention.of(query, visibility, scale, softcap)
    partials = Partials.allocate(grid, batch * kv_heads, plan.pairs, kv_heads, query.device)
    with _on(query.device):
        attention_contribution_split[grid.row_blocks, batch * kv_heads, grid.splits](
            query,
            key,
            value,
            direction,
            *attention.bounds,
            *plan[:5],
            *partials,
            *_strides(query),
            *_strides(key),
            *_strides(value),
            *_strides(direction),
            attention.hole_stride,
            *attention.scalars,
            n_keys,
            steps,
            kv_heads,
            visibility.kv_offset,
            plan.start.shape[1],
            plan.low.shape[1],
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            HALVES=query.element_size() == 2,
            UNROLLED_SPANS=plan.unrolled,
            SPLIT=tiles.SPLIT,
            BLOCK_M=grid.block_m,
            BLOCK_N=grid.tile.block_n,
            BLOCK_D=tiles.padded(head_dim),
            BLOCK_DV=tiles.padded(value_dim),
            LANES_D=tiles.lanes(head_dim, key.element_size()),
            LANES_DV=tiles.lanes(value_dim, key.element_size()),
            **attention.flags,
            **grid.tile.options(grid.arch, grid.block_m),
        )
        rows = _combine_splits(partials[:4], query, kv_heads, visibility.kv_offset, sinks, grid, with_total=True)
        mass, span = _combine_spans(plan, partials, rows, query, kv_heads, grid)
    return Contributions(
        span=span,
        total=rows.total,
        mass=mass,
        total_mass=rows.total_mass,
        lse=rows.lse,
        argmax=rows.argmax,
        **counts._asdict(),
    )


def _span_outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: tuple[Tensor, Tensor],
    attention: Attention,
    rows: Rows,
    kv_offset: int,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """mass (B, H, T, S) and output (B, H, T, S, Dv) of spans with (B, S) start and end columns."""
    batch, heads, steps, head_dim = query.shape
    kv_heads, n_keys, value_dim = value.shape[1:]
    n_spans = columns[0].shape[1]
    mass = torch.empty((batch, heads, steps, n_spans), dtype=torch.float32, device=query.device)
    output = torch.empty((batch, heads, steps, n_spans, value_dim), dtype=torch.float32, device=query.device)
    block_m = 16  # a (rows x head_dim) accumulator is only affordable for few rows
    tile = tiles.select(grid.arch, query.element_size(), head_dim, value_dim)
    lanes = tiles.output_lanes(value_dim, value.element_size())
    span_output[n_spans * -(-value_dim // lanes), -(-(heads // kv_heads * steps) // block_m), batch * kv_heads](
        query,
        key,
        value,
        *attention.bounds,
        *columns,
        rows.largest,
        rows.inverse,
        mass,
        output,
        *_strides(query),
        *_strides(key),
        *_strides(value),
        attention.hole_stride,
        *attention.scalars,
        n_keys,
        steps,
        kv_heads,
        kv_offset,
        n_spans,
        grid.rows,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        HALVES=query.element_size() == 2,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tiles.padded(head_dim),
        LANES_D=tiles.lanes(head_dim, key.element_size()),
        LANES_DV=lanes,
        **attention.flags,
        **tile.options(grid.arch, block_m, stages=1),
    )
    return mass, output


def attention_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    counts: KeyCounts | None = None,
) -> Summary:
    """`locos_fast.ops.attention_summary` by `kernels/attention_summary.py`."""
    query, key, value = map(_readable, (query, key, value))
    batch, heads, steps, head_dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    counts = counts or count_keys(visibility, on_device(spans, query.device), batch, n_keys)
    grid = Grid.of(query, key, key)
    attention = Attention.of(query, visibility, scale, softcap)
    states = torch.empty((2, batch * kv_heads, grid.splits, grid.rows), dtype=torch.float32, device=query.device)
    column = torch.empty((batch * kv_heads, grid.splits, grid.rows), dtype=torch.int32, device=query.device)
    with _on(query.device):
        attention_summary_split[grid.row_blocks, batch * kv_heads, grid.splits](
            query,
            key,
            *attention.bounds,
            *states,
            column,
            *_strides(query),
            *_strides(key),
            attention.hole_stride,
            *attention.scalars,
            n_keys,
            steps,
            kv_heads,
            visibility.kv_offset,
            SPLIT=tiles.SPLIT,
            BLOCK_M=grid.block_m,
            BLOCK_N=grid.tile.block_n,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=tiles.padded(head_dim),
            LANES_D=tiles.lanes(head_dim, key.element_size()),
            **attention.flags,
            **grid.tile.options(grid.arch, grid.block_m),
        )
        rows = _combine_splits(
            (states[0], states[1], states[1], column),
            query,
            kv_heads,
            visibility.kv_offset,
            sinks,
            grid,
            with_total=False,
        )
        columns = span_columns(spans, visibility.kv_offset, batch, n_keys, query.device)
        mass, output = _span_outputs(query, key, value, columns, attention, rows, visibility.kv_offset, grid)
    return Summary(
        span_output=output,
        mass=mass,
        total_mass=rows.total_mass,
        lse=rows.lse,
        argmax=rows.argmax,
        **counts._asdict(),
    )


def ov_contribution(
    attn: Tensor, value: Tensor, direction: Tensor, spans: Tensor, *, visible: Tensor | None = None
) -> Contributions:
    """`locos_fast.ops.ov_contribution` by `kernels/ov_contribution.py`."""
    attn, value, direction = map(_readable, (attn, value, direction))
    batch, heads, steps, n_keys = attn.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    grid = Grid.of(attn, value, value)
    plan = SpanPlan.of(spans, batch, n_keys, grid.tile.block_n, attn.device)
    partials = Partials.allocate(grid, batch * kv_heads, plan.pairs, kv_heads, attn.device)
    total_mass, total = torch.empty((2, batch, heads, steps), dtype=torch.float32, device=attn.device)
    argmax = torch.empty((batch, heads, steps), dtype=torch.int64, device=attn.device)
    with _on(attn.device):
        ov_contribution_split[grid.row_blocks, batch * kv_heads, grid.splits](
            attn,
            value,
            direction,
            *plan[:5],
            *partials,
            *_strides(attn),
            *_strides(value),
            *_strides(direction),
            n_keys,
            steps,
            kv_heads,
            plan.start.shape[1],
            plan.low.shape[1],
            GROUP=heads // kv_heads,
            VALUE_DIM=value_dim,
            HALVES=value.element_size() == 2,
            UNROLLED_SPANS=plan.unrolled,
            SPLIT=tiles.SPLIT,
            BLOCK_M=grid.block_m,
            BLOCK_N=grid.tile.block_n,
            BLOCK_DV=tiles.padded(value_dim),
            LANES_DV=tiles.lanes(value_dim, value.element_size()),
            **grid.tile.options(grid.arch, grid.block_m),
        )
        combine_sums[grid.row_blocks, batch * kv_heads](
            *partials[:4],
            total_mass,
            total,
            argmax,
            grid.splits,
            steps,
            GROUP=heads // kv_heads,
            BLOCK_M=grid.block_m,
            BLOCK_S=COMBINED_AT_ONCE,
        )
        mass, span = _combine_spans(plan, partials, None, attn, kv_heads, grid)
    spans = on_device(spans, attn.device)
    everything = Visibility(spans.new_zeros(steps), spans.new_full((steps,), n_keys))
    return Contributions(
        span=span,
        total=total,
        mass=mass,
        total_mass=total_mass,
        lse=None,
        argmax=argmax,
        visible=spans.new_full((batch, steps), n_keys) if visible is None else visible,
        span_visible=count_span_visible(everything, spans, batch, n_keys),
    )
