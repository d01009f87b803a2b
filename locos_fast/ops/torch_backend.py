"""Blockwise PyTorch backend: keys and values are read once, in blocks; beyond the results extra memory does not grow
with the context.

The rows that share a key/value head (query heads of the group x answer steps) are stacked, so that keys and values are
never repeated: a block costs one matrix product per use. Half-precision blocks are computed in float32. Made for CPUs;
on a GPU, where it stands in for what the kernels do not take (float64), it waits for the device in some steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.ops.attention import Attention, key_counts
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.torch_softmax import LOG2_E, RunningLargest, RunningSoftmax
from locos_fast.ops.torch_spans import SUMMED_AT_ONCE, SpanOutputs, SpanSums
from locos_fast.ops.visibility import KeyCounts, Visibility, count_span_visible

# Keys per block: of 8 heads (head_dim 128, float32) they take 3.7 MB, the scores for 32 rows a head 0.9 MB. A multiple
# of CHUNK, without which a maximum is slow, and of SUMMED_AT_ONCE, without which tiles of spans are cut.
BLOCK = 896
HEADS_PER_THREAD = 4  # in one product: more take more memory, fewer more steps at which threads wait for each other


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
        """Repeat a (B, T) tensor for every query head of a group: (B, 1, G*T)."""
        return x.repeat(1, self.group)[:, None]

    def per_head(self, x: Tensor) -> Tensor:
        """Repeat an (H,) tensor for every answer row: (1, Hkv, G*T)."""
        return x.view(1, self.kv_heads, self.group).repeat_interleave(self.rows, dim=-1)


class Products:
    """Products of the stacked rows with one block of keys or values after another, in float32 at least.

    A block is copied, converted if need be, and multiplied from the copy, which a CPU keeps in the caches of its cores;
    straight from memory products of scores take longer. Up to four heads per thread go into one product. Operators on
    all heads then give each thread what it wrote itself: where cores share no cache, the other's half takes longer to
    come than to multiply. More heads, or several prompts, take turns.
    Buffers are reused: fresh memory pages cost as much as the products.
    """

    def __init__(self, rows: Tensor) -> None:
        """`rows` (B, Hkv, R, D) has the stacked rows' shape and the products' dtype and device."""
        batch, kv_heads, _, _ = rows.shape
        at_most = HEADS_PER_THREAD * torch.get_num_threads() if rows.device.type == "cpu" else kv_heads
        turns = -(-kv_heads // at_most)
        at_once = -(-kv_heads // turns)
        heads = [slice(head, min(head + at_once, kv_heads)) for head in range(0, kv_heads, at_once)]
        self.turns = [(b, h) for b in range(batch) for h in heads] if turns > 1 else None
        self.like = rows
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def cut(self, x: Tensor) -> list[Tensor]:
        """The part of a tensor (B, Hkv, ...) that each turn takes."""
        return list(x.unbind()) if self.turns is None else [x[b][heads] for b, heads in self.turns]

    def scores(self, name: str, rows: list[Tensor], x: list[Tensor], start: int, end: int) -> Tensor:
        """rows (B, Hkv, R, D) times keys `start` to `end` of x (B, Hkv, N, D), both as `cut` gives them.

        (B, Hkv, R, end - start), valid until the next product of that name.
        """
        result = self._room(name, (*self.like.shape[:3], end - start))
        for part, keys, out in zip(rows, x, self.cut(result), strict=True):
            torch.bmm(part, self._copy(keys, start, end).mT, out=out)
        return result

    def outputs(self, weights: Tensor, x: list[Tensor], start: int, end: int) -> Tensor:
        """Weights (B, Hkv, R, end - start) times keys `start` to `end` of x (B, Hkv, N, Dv), which `cut` gave.

        (B, Hkv, R, Dv), valid until the next call.
        """
        result = self._room("outputs", (*weights.shape[:3], x[0].shape[-1]))
        for part, values, out in zip(self.cut(weights), x, self.cut(result), strict=True):
            torch.bmm(part, self._copy(values, start, end), out=out)
        return result

    def _copy(self, x: Tensor, start: int, end: int) -> Tensor:
        block = x[:, start:end]
        return self._room("copy", block.shape).copy_(block)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A buffer of that shape: the largest asked for under that name so far, or a part of it."""
        view = self.views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            if name not in self.memory or self.memory[name].numel() < size:
                self.memory[name] = self.like.new_empty(size)
                self.views = {key: kept for key, kept in self.views.items() if key[0] != name}
            view = self.views[name, shape] = self.memory[name][:size].view(shape)
        return view


class Scorer:
    """Scores of stacked rows against one block of keys after another, masked by visibility, and their softmax."""

    def __init__(self, attention: Attention) -> None:
        query, key, _, visibility, scale, softcap, sinks = attention
        self.softcap, self.visibility = softcap, visibility
        self.layout = GroupedRows.of(query, key.shape[1])
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query = self.layout.stack(query).to(self.dtype) * (LOG2_E * scale if softcap is None else scale / softcap)
        self.softmax = RunningSoftmax(self.query[..., 0], None if sinks is None else self.layout.per_head(sinks))
        self.products = Products(self.query)
        self.query_parts, self.key_parts = self.products.cut(self.query), self.products.cut(key)
        first, last = visibility.columns(query.shape[0])
        self.first, self.last = self.layout.per_row(first), self.layout.per_row(last)  # (B, 1, G*T)
        n_keys = key.shape[2]
        self.range = max(int(first.min()), 0), min(int(last.max()), n_keys)  # columns some row sees
        self.everyone = int(first.max()), int(last.min())  # columns every row sees, holes apart

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The first is cut where tiles of spans are."""
        first, last = self.range
        for start in range(first // SUMMED_AT_ONCE * SUMMED_AT_ONCE, last, BLOCK):
            yield start, min(start + BLOCK, last)

    def scores(self, start: int, end: int) -> Tensor:
        """(B, Hkv, G*T, end - start) in base 2, -inf where a row does not see the column; valid until the next call."""
        scores = self.products.scores("scores", self.query_parts, self.key_parts, start, end)
        if self.softcap is not None:
            scores = scores.tanh_().mul_(LOG2_E * self.softcap)
        self._hide(scores, start, end)
        return scores

    def exponentials(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The scores taken into the softmax; see `RunningSoftmax.add`."""
        return self.softmax.add(self.scores(start, end), self.visibility.kv_offset + start)

    def _hide(self, scores: Tensor, start: int, end: int) -> None:
        """-inf where a row does not see the column; most blocks have no such column, most others a few at one end."""
        holes = self.visibility.key_mask
        if holes is not None:
            scores.masked_fill_(~holes[:, None, None, start:end], -torch.inf)
        for low, high in ((start, min(self.everyone[0], end)), (max(self.everyone[1], start), end)):
            if low < high:
                column = torch.arange(low, high, device=scores.device)
                hidden = (column < self.first[..., None]) | (column >= self.last[..., None])
                scores[..., low - start : high - start].masked_fill_(hidden, -torch.inf)


class Projection:
    """Sums of phi over blocks of columns.

    phi itself is only computed where there are spans, from the first to the last in a block; elsewhere the values are
    weighted and summed first, which saves two passes over the block. Columns near a few spans are multiplied twice.
    """

    def __init__(self, products: Products, direction: Tensor, value: Tensor) -> None:
        self.products, self.direction = products, direction
        self.direction_parts, self.value_parts = products.cut(direction), products.cut(value)

    def phi(self, weights: Tensor, start: int, end: int) -> Tensor:
        """(B, Hkv, R, end - start) from weights of that shape, valid until the next call."""
        return self.products.scores("phi", self.direction_parts, self.value_parts, start, end).mul_(weights)

    def total(self, weights: Tensor, start: int, end: int, spans: SpanSums, reference: Tensor | None = None) -> Tensor:
        """Sum over a block (B, Hkv, R); what spans hold of it is added to their sums.

        `weights` (B, Hkv, R, end - start) are attention weights, or exponentials relative to `reference`.
        """
        low, high = spans.reach(start, end)
        if low < high:
            near = weights[..., low - start : high - start]
            phi = self.phi(near, low, high)
            spans.add(low, near, phi, reference=reference)
            if (low, high) == (start, end):
                return phi.sum(-1)
        return (self.products.outputs(weights, self.value_parts, start, end) * self.direction).sum(-1)


def attention_contribution(
    attention: Attention, direction: Tensor, spans: Tensor, counts: KeyCounts | None = None
) -> Contributions:
    """Sums of phi from queries, keys and values: online softmax with scalar payloads (total, spans, span masses)."""
    scorer = Scorer(attention)
    layout, softmax = scorer.layout, scorer.softmax
    direction = layout.stack(direction).to(scorer.dtype)
    total = torch.zeros_like(softmax.denominator)
    span_sums = SpanSums(spans, attention.visibility.kv_offset, attention.key.shape[2], total, fields=2)
    projection = Projection(scorer.products, direction, attention.value)
    for start, end in scorer.blocks():
        exponentials, keep = scorer.exponentials(start, end)
        total.mul_(keep).add_(projection.total(exponentials, start, end, span_sums, softmax.reference))
    to_alpha = softmax.to_alpha()
    mass, span = span_sums.result(softmax)
    return Contributions(
        span=layout.unstack(span),
        total=layout.unstack(total * to_alpha),
        mass=layout.unstack(mass),
        total_mass=layout.unstack(softmax.denominator * to_alpha),
        lse=layout.unstack(softmax.lse()),
        argmax=layout.unstack(softmax.largest.argmax()),
        **(counts or key_counts(attention, spans))._asdict(),
    )


def attention_summary(attention: Attention, spans: Tensor, counts: KeyCounts | None = None) -> Summary:
    """The lean path: one pass over the keys; values are read only inside the spans."""
    scorer = Scorer(attention)
    layout, softmax = scorer.layout, scorer.softmax
    outputs = SpanOutputs(spans, attention.visibility.kv_offset, scorer.query[..., 0], attention.value)
    for start, end in scorer.blocks():
        exponentials, _ = scorer.exponentials(start, end)
        outputs.add(start, exponentials, softmax.reference)
    mass, span_output = outputs.result(softmax)
    return Summary(
        span_output=layout.unstack(span_output),
        mass=layout.unstack(mass),
        total_mass=layout.unstack(softmax.denominator * softmax.to_alpha()),
        lse=layout.unstack(softmax.lse()),
        argmax=layout.unstack(softmax.largest.argmax()),
        **(counts or key_counts(attention, spans))._asdict(),
    )


def ov_contribution(
    attn: Tensor, value: Tensor, direction: Tensor, spans: Tensor, *, visible: Tensor | None = None
) -> Contributions:
    """Sums of phi from given attention weights; `spans` in columns."""
    batch, _, rows, n_keys = attn.shape
    layout = GroupedRows.of(attn, value.shape[1])
    dtype = torch.promote_types(attn.dtype, torch.float32)
    direction = layout.stack(direction).to(dtype)
    total, total_mass = (torch.zeros_like(direction[..., 0]) for _ in range(2))
    largest = RunningLargest(total, 0.0)
    span_sums = SpanSums(spans, 0, n_keys, total, fields=2)
    projection = Projection(Products(direction), direction, value)
    for start in range(0, n_keys, BLOCK):
        end = min(start + BLOCK, n_keys)
        alpha = layout.stack(attn[..., start:end]).to(dtype)  # stacking copies where T and H are transposed
        total += projection.total(alpha, start, end, span_sums)
        total_mass += alpha.sum(-1)
        largest.add(alpha, start)
    mass, span = span_sums.result()
    everything = Visibility(spans.new_zeros(rows), spans.new_full((rows,), n_keys))
    return Contributions(
        span=layout.unstack(span),
        total=layout.unstack(total),
        mass=layout.unstack(mass),
        total_mass=layout.unstack(total_mass),
        lse=None,
        argmax=layout.unstack(largest.argmax()),
        visible=spans.new_full((batch, rows), n_keys) if visible is None else visible,
        span_visible=count_span_visible(everything, spans, batch, n_keys),
    )


def position_contribution(attention: Attention, direction: Tensor) -> Tensor:
    """phi itself, (B, H, T, N): one pass for the normaliser, one to write."""
    scorer = Scorer(attention)
    layout, softmax = scorer.layout, scorer.softmax
    for block in scorer.blocks():
        scorer.exponentials(*block)
    to_alpha = softmax.to_alpha()[..., None]
    projection = Projection(scorer.products, layout.stack(direction).to(scorer.dtype), attention.value)
    phi = to_alpha.new_zeros((*to_alpha.shape[:-1], attention.key.shape[2]))
    for start, end in scorer.blocks():
        alpha = scorer.scores(start, end).sub_(softmax.reference[..., None]).exp2_().mul_(to_alpha)
        phi[..., start:end] = projection.phi(alpha, start, end)
    return layout.unstack(phi)
