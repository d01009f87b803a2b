"""One attention call: what it is computed from, and how."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from locos_fast.ops.visibility import KeyCounts, Visibility, count_keys


class Attention(NamedTuple):
    """Queries, keys and values, and what turns them into weights; checked, as every backend is given it."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, Hkv, N, D)
    value: Tensor  # (B, Hkv, N, Dv)
    visibility: Visibility
    scale: float  # factor on the scores
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # (H,) one more logit per head, in the denominator only


def key_counts(attention: Attention, spans: Tensor) -> KeyCounts:
    """What the rows of a call see, of all keys and of each span's; `spans` (B or 1, S, 2) on its device."""
    batch, _, n_keys, _ = attention.key.shape
    return count_keys(attention.visibility, spans, batch, n_keys)
