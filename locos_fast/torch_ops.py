"""Blockwise PyTorch backend: keys and values are read once, in blocks; extra memory does not grow with the context.

The rows that share a key/value head (query heads of the group x answer steps) are stacked, so that keys and values are
never repeated: a block costs one matrix product per use. Half-precision blocks are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.contributions import Contributions, Summary
from locos_fast.softmax_state import SoftmaxState, merge, normaliser, weight
from locos_fast.span_plan import SpanPlan
from locos_fast.visibility import KeyCounts, Visibility, count_keys, count_span_visible

BLOCK = 2048  # keys per block: a block of scores (32 rows x 8 heads, float32) is 2 MB and stays in cache
CHUNK = 64  # scores whose maximum is taken first, vectorised, when the position of the largest is looked for
SUMMED_AT_ONCE = 128  # columns per sum over spans: a matrix product adds one by one, and the rounding adds up


class GroupedRows(NamedTuple):
    """Rows stacked per key/value head: (B, H, T, x) <-> (B, Hkv, G*T, x); row r of a group is (g, t) = divmod(r, T)."""

    kv_heads: int
    group: int
    rows: int  # T

    @classmethod
    def of(cls, query: Tensor, kv_heads: int) -> GroupedRows:
        return cls(kv_heads, query.shape[1] // kv_heads, query.shape[2])

    def stack(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.kv_heads, self.group * self.rows, *x.shape[3:])

    def unstack(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.kv_heads * self.group, self.rows, *x.shape[3:])

    def per_row(self, x: Tensor) -> Tensor:
        """Repeat a (B, T, ...) tensor for every query head of a group: (B, 1, G*T, ...)."""
        return x.repeat(1, self.group, *(1 for _ in x.shape[2:]))[:, None]

    def per_head(self, x: Tensor) -> Tensor:
        """Repeat an (H,) tensor for every answer row: (1, Hkv, G*T)."""
        return x.view(1, self.kv_heads, self.group).repeat_interleave(self.rows, dim=-1)


class Scorer:
    """Scores of stacked rows against one block of keys after another, masked by visibility."""

    def __init__(self, query: Tensor, key: Tensor, visibility: Visibility, scale: float, softcap: float | None) -> None:
        self.key, self.softcap, self.visibility = key, softcap, visibility
        self.layout = GroupedRows.of(query, key.shape[1])
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query = self.layout.stack(query).to(self.dtype) * (scale if softcap is None else scale / softcap)
        first, last = visibility.columns(query.shape[0])
        self.first, self.last = self.layout.per_row(first), self.layout.per_row(last)  # (B, 1, G*T)
        self.buffer = key.new_empty(0, dtype=self.dtype)
        n_keys = key.shape[2]
        self.range = max(int(first.min()), 0), min(int(last.max()), n_keys)  # columns some row sees
        self.everyone = int(first.max()), int(last.min())  # columns every row sees, holes apart

    def blocks(self) -> Iterator[tuple[int, int]]:
        for start in range(*self.range, BLOCK):
            yield start, min(start + BLOCK, self.range[1])

    def fetch(self, x: Tensor, start: int, end: int) -> Tensor:
        """Columns of key or value in the dtype of the scores, valid until the next fetch.

        Always a copy into the same memory: the matrix product then reads from cache (straight from memory it takes a
        sixth longer), and no fresh pages are asked for in every block.
        """
        block = x[:, :, start:end]
        if self.buffer.numel() < block.numel():
            self.buffer = x.new_empty(block.numel(), dtype=self.dtype)
        return self.buffer[: block.numel()].view(block.shape).copy_(block)

    def scores(self, start: int, end: int) -> Tensor:
        """(B, Hkv, G*T, end - start) scores, -inf where a row does not see the column."""
        scores = self.query @ self.fetch(self.key, start, end).mT
        if self.softcap is not None:
            scores = scores.tanh_().mul_(self.softcap)
        hidden = self._hidden(start, end)
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)

    def _hidden(self, start: int, end: int) -> Tensor | None:
        holes = self.visibility.key_mask
        if holes is None and start >= self.everyone[0] and end <= self.everyone[1]:
            return None
        column = torch.arange(start, end, device=self.first.device)
        hidden = (column < self.first[..., None]) | (column >= self.last[..., None])
        return hidden if holes is None else hidden | ~holes[:, None, None, start:end]


def largest_score(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores.max(-1)`, the first on ties, four times as fast: torch does not vectorise a maximum with its position."""
    columns = scores.shape[-1]
    if columns % CHUNK:
        return scores.max(-1)
    chunks = scores.unflatten(-1, (columns // CHUNK, CHUNK))
    largest, chunk = chunks.amax(-1).max(-1)
    winner = chunks.gather(-2, chunk[..., None, None].expand(*chunk.shape, 1, CHUNK))[..., 0, :]
    return largest, chunk * CHUNK + winner.argmax(-1)


def block_state(scores: Tensor, first_slot: int) -> tuple[SoftmaxState, Tensor]:
    """The state of one block, without payload, and its exponentials; overwrites `scores`."""
    largest, argmax = largest_score(scores)
    seen = largest != -torch.inf
    exponentials = scores.sub_(torch.where(seen, largest, 0.0)[..., None]).exp_()
    slots = torch.where(seen, argmax + first_slot, -1)
    return SoftmaxState(largest, slots, exponentials.sum(-1), scores.new_empty((*largest.shape, 0))), exponentials


class SpanSums:
    """Sums of fields over the columns of each span: tile by tile, touching only the columns and spans that meet.

    The sums are relative to the largest score of the blocks so far, as in `SoftmaxState`; they are rescaled only when a
    larger one turns up, since there may be many spans.
    """

    def __init__(self, spans: Tensor, kv_offset: int, n_keys: int, rows: Tensor, fields: int) -> None:
        """`rows` is any (B, Hkv, R) tensor of the sums' dtype and device."""
        columns = (spans - kv_offset).cpu()
        self.plan = SpanPlan.of(columns, rows.shape[0], n_keys, SUMMED_AT_ONCE, rows.device)
        self.low, self.high = self.plan.low.amin(0).tolist(), self.plan.high.amax(0).tolist()
        self.sums = rows.new_zeros((fields, *rows.shape, self.plan.start.shape[1]))
        self.reference = torch.full_like(rows, -torch.inf)

    def add(self, start: int, *fields: Tensor, largest: Tensor | None = None) -> None:
        """Add blocks (B, Hkv, R, n) whose first column is `start`; `largest` (B, Hkv, R) is the score that they are
        relative to, None if to none."""
        end = start + fields[0].shape[-1]
        for tile in range(start // SUMMED_AT_ONCE, -(-end // SUMMED_AT_ONCE)):
            first, last = self.low[tile], self.high[tile]
            if first >= last:
                continue
            share = None if largest is None else self._rescale(largest)
            left, right = max(tile * SUMMED_AT_ONCE, start), min((tile + 1) * SUMMED_AT_ONCE, end)
            inside = self._inside(left, right, first, last)
            for into, field in zip(self.sums, fields, strict=True):
                part = field[..., left - start : right - start] @ inside
                into[..., first:last] += part if share is None else part.mul_(share)

    def _rescale(self, largest: Tensor) -> Tensor:
        """Make room for sums relative to `largest`; returns the factor that such sums take, (B, Hkv, R, 1)."""
        reference = torch.maximum(self.reference, largest)
        finite = torch.where(reference == -torch.inf, 0.0, reference)  # (-inf) - (-inf) would be NaN
        if not torch.equal(reference, self.reference):
            self.sums *= (self.reference - finite).exp()[..., None]
            self.reference = reference
        return (largest - finite).exp()[..., None]

    def result(self, lse: Tensor | None = None) -> Tensor:
        """(fields, B, Hkv, R, S) in the order the spans were given; weighted by alpha where `lse` (B, Hkv, R) is
        given."""
        if lse is not None:
            self.sums *= torch.where(self.reference == -torch.inf, 0.0, (self.reference - lse).exp())[..., None]
        return self.plan.restore_order(self.sums)

    def _inside(self, left: int, right: int, first: int, last: int) -> Tensor:
        """(B, 1, right - left, last - first): whether a column lies in a span."""
        column = torch.arange(left, right, device=self.plan.start.device)[:, None]
        start, end = (bound[:, None, first:last] for bound in (self.plan.start, self.plan.end))
        return ((column >= start) & (column < end))[:, None].to(self.sums.dtype)


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
    """Sums of phi from queries, keys and values: online softmax with scalar payloads (total, spans, span masses)."""
    scorer = Scorer(query, key, visibility, scale, softcap)
    layout = scorer.layout
    direction = layout.stack(direction).to(scorer.dtype)
    state = SoftmaxState.empty(scorer.query.shape[:-1], 1, scorer.query)
    span_sums = SpanSums(spans, visibility.kv_offset, key.shape[2], state.largest, fields=2)
    for start, end in scorer.blocks():
        block, exponentials = block_state(scorer.scores(start, end), visibility.kv_offset + start)
        phi = direction @ scorer.fetch(value, start, end).mT
        phi *= exponentials
        span_sums.add(start, exponentials, phi, largest=block.largest)
        state = merge(state, block._replace(sums=phi.sum(-1, keepdim=True)))
    lse = normaliser(state, None if sinks is None else layout.per_head(sinks))
    to_alpha = weight(state, lse)
    mass, span = span_sums.result(lse)
    return Contributions(
        span=layout.unstack(span),
        total=layout.unstack(state.sums[..., 0] * to_alpha),
        mass=layout.unstack(mass),
        total_mass=layout.unstack(state.denominator * to_alpha),
        lse=layout.unstack(lse),
        argmax=layout.unstack(state.argmax),
        **(counts or count_keys(visibility, spans, key.shape[0], key.shape[2]))._asdict(),
    )


def softmax_pass(scorer: Scorer, kv_offset: int) -> SoftmaxState:
    """One pass over the keys: the state of every row, without payload."""
    state = SoftmaxState.empty(scorer.query.shape[:-1], 0, scorer.query)
    for start, end in scorer.blocks():
        block, _ = block_state(scorer.scores(start, end), kv_offset + start)
        state = merge(state, block)
    return state


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
    """The lean path: one pass over the keys, then keys and values of the spans only."""
    scorer = Scorer(query, key, visibility, scale, softcap)
    layout = scorer.layout
    state = softmax_pass(scorer, visibility.kv_offset)
    lse = normaliser(state, None if sinks is None else layout.per_head(sinks))
    mass, span_output = _span_outputs(scorer, value, spans - visibility.kv_offset, lse)
    return Summary(
        span_output=layout.unstack(span_output),
        mass=layout.unstack(mass),
        total_mass=layout.unstack(state.denominator * weight(state, lse)),
        lse=layout.unstack(lse),
        argmax=layout.unstack(state.argmax),
        **(counts or count_keys(visibility, spans, key.shape[0], key.shape[2]))._asdict(),
    )


def _span_outputs(scorer: Scorer, value: Tensor, columns: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """mass (B, Hkv, R, S) and span_output (B, Hkv, R, S, Dv); `columns` is (B or 1, S, 2)."""
    n_spans = columns.shape[1]
    mass = lse.new_zeros((*lse.shape, n_spans))
    output = lse.new_zeros((*lse.shape, n_spans, value.shape[-1]))
    finite_lse = torch.where(lse == -torch.inf, 0.0, lse)[..., None]
    for index in range(n_spans):
        low = max(int(columns[:, index, 0].min()), scorer.range[0])
        high = min(int(columns[:, index, 1].max()), scorer.range[1])
        for start in range(low, high, BLOCK):
            end = min(start + BLOCK, high)
            alpha = (scorer.scores(start, end) - finite_lse).exp()
            column = torch.arange(start, end, device=lse.device)
            inside = (column >= columns[:, index, :1]) & (column < columns[:, index, 1:])  # (B or 1, n)
            alpha = alpha * inside[:, None, None]
            mass[..., index] += alpha.sum(-1)
            output[..., index, :] += alpha @ value[:, :, start:end].to(scorer.dtype)
    return mass, output


def ov_contribution(
    attn: Tensor, value: Tensor, direction: Tensor, spans: Tensor, *, visible: Tensor | None = None
) -> Contributions:
    """Sums of phi from given attention weights; `spans` in columns."""
    batch, _, rows, n_keys = attn.shape
    layout = GroupedRows.of(attn, value.shape[1])
    dtype = torch.promote_types(attn.dtype, torch.float32)
    direction = layout.stack(direction).to(dtype)
    shape = direction.shape[:-1]
    total, total_mass = (torch.zeros(shape, dtype=dtype, device=attn.device) for _ in range(2))
    span_sums = SpanSums(spans, 0, n_keys, total, fields=2)
    largest = torch.zeros_like(total)
    argmax = torch.full(shape, -1, device=attn.device)
    for start in range(0, n_keys, BLOCK):
        alpha = layout.stack(attn[..., start : start + BLOCK]).to(dtype)  # stacking copies where T and H are transposed
        phi = alpha * (direction @ value[:, :, start : start + BLOCK].to(dtype).mT)
        total += phi.sum(-1)
        total_mass += alpha.sum(-1)
        span_sums.add(start, alpha, phi)
        block_largest, block_argmax = alpha.max(-1)
        argmax = torch.where(block_largest > largest, block_argmax + start, argmax)
        largest = torch.maximum(largest, block_largest)
    mass, span = span_sums.result()
    everything = Visibility(spans.new_zeros(rows), spans.new_full((rows,), n_keys))
    return Contributions(
        span=layout.unstack(span),
        total=layout.unstack(total),
        mass=layout.unstack(mass),
        total_mass=layout.unstack(total_mass),
        lse=None,
        argmax=layout.unstack(argmax),
        visible=spans.new_full((batch, rows), n_keys) if visible is None else visible,
        span_visible=count_span_visible(everything, spans, batch, n_keys),
    )


def position_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    direction: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """phi itself, (B, H, T, N): one pass for the normaliser, one to write."""
    scorer = Scorer(query, key, visibility, scale, softcap)
    layout = scorer.layout
    lse = normaliser(softmax_pass(scorer, 0), None if sinks is None else layout.per_head(sinks))
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    direction = layout.stack(direction).to(scorer.dtype)
    phi = lse.new_zeros((*lse.shape, key.shape[2]))
    for start, end in scorer.blocks():
        alpha = scorer.scores(start, end).sub_(lse[..., None]).exp_()
        torch.mul(alpha, direction @ scorer.fetch(value, start, end).mT, out=phi[..., start:end])
    return layout.unstack(phi)
