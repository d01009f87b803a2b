"""The definition, written once and naively: the truth of every test and benchmark.

Everything is computed in the dtype of the inputs (softmax in float32 at least, as models do), so that a run in float64
gives the truth and a run in the kernel's own dtype gives the error a careful user would accept.

    phi[t, j, h] = alpha[t, j, h] * (direction[t, h] . value[j, g])        LOCOS, arXiv 2607.01002

Spans arrive here as a (B or 1, S, 2) tensor; `locos_fast.ops` is the door that takes anything friendlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locos_fast.ops.attention import Attention, key_counts
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.visibility import KeyCounts, Visibility, count_span_visible


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """Key or value head g serves query heads g*G ... g*G + G-1: (B, Hkv, N, D) -> (B, H, N, D)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 otherwise."""
    return torch.promote_types(x.dtype, torch.float32)


def attention_scores(
    query: Tensor, key: Tensor, visibility: Visibility, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Scores before the softmax, (B, H, T, N), -inf where a row does not see the key."""
    scores = query @ repeat_kv(key, query.shape[1]).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visibility.mask(query.shape[0], key.shape[2])[:, None]
    return scores.to(result_dtype(query)).masked_fill(~seen, -torch.inf)


def softmax_normaliser(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Natural-log normaliser (B, H, T); a sink is one more logit per head, in the denominator only."""
    lse = scores.logsumexp(-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse)[None, :, None].expand_as(lse))


def attention_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """alpha (B, H, T, N); zero in rows that see nothing."""
    return torch.where(scores == -torch.inf, 0.0, (scores - lse[..., None]).exp())


def softmax(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, normaliser and weights of a call, the weights in the dtype of its queries."""
    query, key, _, visibility, scale, softcap, sinks = attention
    scores = attention_scores(query, key, visibility, scale=scale, softcap=softcap)
    lse = softmax_normaliser(scores, sinks)
    return scores, lse, attention_weights(scores, lse).to(query.dtype)


def span_mask(spans: Tensor, kv_offset: int, n_keys: int) -> Tensor:
    """(B or 1, S, N) bool: which columns lie inside which span."""
    slot = kv_offset + torch.arange(n_keys, device=spans.device)
    start, end = spans[..., :1], spans[..., 1:]
    return (slot >= start) & (slot < end)


def largest_slot(weights: Tensor, empty: float, kv_offset: int) -> Tensor:
    """Slot of the largest entry, the first one on ties; -1 in rows with nothing above `empty`."""
    return torch.where(weights.amax(-1) > empty, weights.argmax(-1) + kv_offset, -1)


def ov_contribution(
    attn: Tensor, value: Tensor, direction: Tensor, spans: Tensor, *, visible: Tensor | None = None
) -> Contributions:
    """Sums of phi from given attention weights; `spans` in columns."""
    batch, heads, rows, n_keys = attn.shape
    phi = attn * (direction.to(value.dtype) @ repeat_kv(value, heads).mT)  # (B, H, T, N)
    inside = span_mask(spans, 0, n_keys)[:, None, None]  # (B or 1, 1, 1, S, N)
    everything = Visibility(torch.zeros_like(spans[:1, :1, 0]), torch.full_like(spans[:1, :1, 0], n_keys))
    dtype = result_dtype(attn)
    return Contributions(
        span=(phi[..., None, :] * inside).sum(-1).to(dtype),
        total=phi.sum(-1).to(dtype),
        mass=(attn[..., None, :] * inside).sum(-1).to(dtype),
        total_mass=attn.sum(-1).to(dtype),
        lse=None,
        argmax=largest_slot(attn, 0.0, 0),
        visible=spans.new_full((batch, rows), n_keys) if visible is None else visible,
        span_visible=count_span_visible(everything, spans, batch, n_keys).expand(-1, rows, -1),
    )


def attention_contribution(
    attention: Attention, direction: Tensor, spans: Tensor, counts: KeyCounts | None = None
) -> Contributions:
    """Sums of phi from queries, keys and values; `spans` in slots."""
    scores, lse, weights = softmax(attention)
    kv_offset = attention.visibility.kv_offset
    return ov_contribution(weights, attention.value, direction, spans - kv_offset)._replace(
        lse=lse,
        argmax=largest_slot(scores, -torch.inf, kv_offset),
        **(counts or key_counts(attention, spans))._asdict(),
    )


def attention_summary(attention: Attention, spans: Tensor, counts: KeyCounts | None = None) -> Summary:
    """Each span's share of the head output and the softmax statistics; `spans` in slots."""
    query, key, value, visibility = attention[:4]
    scores, lse, weights = softmax(attention)
    inside = span_mask(spans, visibility.kv_offset, key.shape[2])[:, None, None]
    span_weights = weights[..., None, :] * inside  # (B, H, T, S, N)
    dtype = result_dtype(query)
    return Summary(
        span_output=torch.einsum("bhtsn,bhnd->bhtsd", span_weights, repeat_kv(value, query.shape[1])).to(dtype),
        mass=span_weights.sum(-1).to(dtype),
        total_mass=weights.sum(-1).to(dtype),
        lse=lse,
        argmax=largest_slot(scores, -torch.inf, visibility.kv_offset),
        **(counts or key_counts(attention, spans))._asdict(),
    )


def position_contribution(attention: Attention, direction: Tensor) -> Tensor:
    """phi itself, (B, H, T, N)."""
    weights, value = softmax(attention)[2], attention.value
    phi = weights * (direction.to(value.dtype) @ repeat_kv(value, weights.shape[1]).mT)
    return phi.to(result_dtype(value))
