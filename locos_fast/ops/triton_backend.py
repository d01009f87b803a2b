"""Launches the Triton kernels: chooses the tile, plans the spans, allocates the partial results. No host
synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.kernels import tiles
from locos_fast.kernels.attention_contribution import attention_contribution_split
from locos_fast.kernels.attention_summary import attention_summary_split, span_output
from locos_fast.kernels.ov_contribution import ov_contribution_split
from locos_fast.ops.attention import Attention, key_counts
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.triton_grid import Grid, on, readable, strides
from locos_fast.ops.triton_partials import Pairs, Rows, Splits, softmax_rows, span_sums, weight_sums
from locos_fast.ops.triton_spans import SpanPlan, columns_inside, on_device, span_columns
from locos_fast.ops.visibility import KeyCounts


class KernelArguments(NamedTuple):
    """The arguments that all attention kernels share."""

    bounds: tuple[Tensor, Tensor, Tensor]  # first, last (B, T) and the holes
    hole_stride: int
    holes: bool
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, attention: Attention) -> KernelArguments:
        query, _, _, visibility, scale, softcap, _ = attention
        shape = (query.shape[0], query.shape[2])
        first, last = (bound.expand(shape).contiguous() for bound in (visibility.first, visibility.last))
        holes = visibility.key_mask
        if holes is None:
            return cls((first, last, first), 0, False, scale, softcap)
        holes = holes.contiguous().view(torch.uint8)
        return cls((first, last, holes), holes.stride(0), True, scale, softcap)

    @property
    def scalars(self) -> tuple[int, float, float]:
        return self.hole_stride, self.scale, self.softcap or 0.0

    @property
    def flags(self) -> dict[str, bool]:
        return {"SOFTCAP": self.softcap is not None, "HOLES": self.holes}


def _key_lanes(key: Tensor) -> dict[str, int]:
    """How a kernel takes the products with keys."""
    head_dim = key.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tiles.padded(head_dim),
        "LANES_D": tiles.lanes(head_dim, key.element_size()),
    }


def _value_lanes(value: Tensor) -> dict[str, int]:
    """How a kernel takes the products of directions with values."""
    value_dim = value.shape[-1]
    return {
        "VALUE_DIM": value_dim,
        "BLOCK_DV": tiles.padded(value_dim),
        "LANES_DV": tiles.lanes(value_dim, value.element_size()),
        "HALVES": value.element_size() == tiles.HALF,
    }


def attention_contribution(
    attention: Attention, direction: Tensor, spans: Tensor, counts: KeyCounts | None = None
) -> Contributions:
    """`locos_fast.ops.attention_contribution` by `kernels/attention_contribution.py`."""
    query, key, value, direction = map(readable, (*attention[:3], direction))
    batch, n_keys, kv_offset = query.shape[0], key.shape[2], attention.visibility.kv_offset
    grid = Grid.of(query, key, value)
    plan = SpanPlan.of(spans - kv_offset, batch, n_keys, grid.tile.block_n, query.device)
    counts = counts or key_counts(attention, on_device(spans, query.device))
    shared = KernelArguments.of(attention)
    splits = Splits.allocate(grid, query.device, sums=3)
    pairs = Pairs.allocate(grid, plan.pairs, query.device)
    with on(query.device):
        pairs.largest.fill_(-torch.inf)  # a tile that is hidden from every row writes no pair
        attention_contribution_split[grid.programs](
            query,
            key,
            value,
            direction,
            *shared.bounds,
            *plan.table,
            *splits,
            *pairs,
            *strides(query, key, value, direction),
            *shared.scalars,
            n_keys,
            grid.steps,
            grid.kv_heads,
            kv_offset,
            plan.start.shape[1],
            plan.low.shape[1],
            UNROLLED_SPANS=plan.unrolled,
            **_key_lanes(key),
            **_value_lanes(value),
            **shared.flags,
            **grid.constants,
        )
        rows = softmax_rows(splits, kv_offset, attention.sinks, grid)
        mass, span = span_sums(plan, pairs, rows, grid)
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
    shared: KernelArguments,
    rows: Rows,
    kv_offset: int,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """mass (B, H, T, S) and output (B, H, T, S, Dv) of spans with (B, S) start and end columns."""
    n_keys, value_dim = value.shape[2:]
    n_spans = columns[0].shape[1]
    shape = (*query.shape[:3], n_spans)
    mass = torch.empty(shape, dtype=torch.float32, device=query.device)
    output = torch.empty((*shape, value_dim), dtype=torch.float32, device=query.device)
    block_m = 16  # a (rows x head_dim) accumulator is only affordable for few rows
    tile = tiles.select(grid.arch, query.element_size(), key.shape[-1], value_dim, block_m)
    lanes = tiles.output_lanes(value_dim, value.element_size())
    span_output[n_spans * -(-value_dim // lanes), -(-grid.group * grid.steps // block_m), grid.batch * grid.kv_heads](
        query,
        key,
        value,
        *shared.bounds,
        *columns,
        rows.largest,
        rows.inverse,
        mass,
        output,
        *strides(query, key, value),
        *shared.scalars,
        n_keys,
        grid.steps,
        grid.kv_heads,
        kv_offset,
        n_spans,
        grid.rows,
        GROUP=grid.group,
        VALUE_DIM=value_dim,
        HALVES=value.element_size() == tiles.HALF,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        LANES_DV=lanes,
        **_key_lanes(key),
        **shared.flags,
        **tile.options(grid.arch, stages=1),
    )
    return mass, output


def attention_summary(attention: Attention, spans: Tensor, counts: KeyCounts | None = None) -> Summary:
    """`locos_fast.ops.attention_summary` by `kernels/attention_summary.py`."""
    query, key, value = map(readable, attention[:3])
    batch, n_keys, kv_offset = query.shape[0], key.shape[2], attention.visibility.kv_offset
    counts = counts or key_counts(attention, on_device(spans, query.device))
    grid = Grid.of(query, key, key)
    shared = KernelArguments.of(attention)
    splits = Splits.allocate(grid, query.device, sums=2)
    with on(query.device):
        attention_summary_split[grid.programs](
            query,
            key,
            *shared.bounds,
            splits.largest,
            splits.denominator,
            splits.column,
            *strides(query, key),
            *shared.scalars,
            n_keys,
            grid.steps,
            grid.kv_heads,
            kv_offset,
            **_key_lanes(key),
            **shared.flags,
            **grid.constants,
        )
        rows = softmax_rows(splits, kv_offset, attention.sinks, grid)
        columns = span_columns(spans, kv_offset, batch, n_keys, query.device)
        mass, output = _span_outputs(query, key, value, columns, shared, rows, kv_offset, grid)
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
    attn, value, direction = map(readable, (attn, value, direction))
    batch, _, steps, n_keys = attn.shape
    grid = Grid.of(attn, value, value)
    plan = SpanPlan.of(spans, batch, n_keys, grid.tile.block_n, attn.device)
    splits = Splits.allocate(grid, attn.device, sums=3)
    pairs = Pairs.allocate(grid, plan.pairs, attn.device)  # no tile is hidden, so that every pair is written
    with on(attn.device):
        ov_contribution_split[grid.programs](
            attn,
            value,
            direction,
            *plan.table,
            *splits,
            *pairs,
            *strides(attn, value, direction),
            n_keys,
            grid.steps,
            grid.kv_heads,
            plan.start.shape[1],
            plan.low.shape[1],
            UNROLLED_SPANS=plan.unrolled,
            **_value_lanes(value),
            **grid.constants,
        )
        sums = weight_sums(splits, grid)
        mass, span = span_sums(plan, pairs, None, grid)
    if visible is None:
        visible = torch.full((batch, steps), n_keys, device=attn.device)
    inside = columns_inside(spans, n_keys, attn.device)
    return Contributions(
        span=span,
        total=sums.total,
        mass=mass,
        total_mass=sums.total_mass,
        lse=None,
        argmax=sums.argmax,
        visible=visible,
        span_visible=inside[:, None].expand(batch, steps, -1),
    )
