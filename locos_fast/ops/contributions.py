"""What the tensor functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Contributions(NamedTuple):
    """Sums of the per-position logit contribution phi and of the attention weight alpha, per span and over all keys.

    float32; float64 when the inputs are float64 (backends torch and reference). Logits are in the units of `direction`.
    """

    span: Tensor  # (B, H, T, S) sum of phi inside each span
    total: Tensor  # (B, H, T) sum of phi over all visible keys
    mass: Tensor  # (B, H, T, S) sum of alpha inside each span
    total_mass: Tensor  # (B, H, T) sum of alpha over all visible keys; below 1 under attention sinks
    lse: Tensor | None  # (B, H, T) natural-log softmax normaliser, sinks included; None if weights were given
    argmax: Tensor  # (B, H, T) int64 slot of the largest alpha, -1 where a row sees nothing
    visible: Tensor  # (B, T) int64 number of visible keys
    span_visible: Tensor  # (B, T, S) int64 number of visible keys inside each span


class Summary(NamedTuple):
    """What scoring needs of one attention layer: the spans' share of the head output, and the softmax statistics."""

    span_output: Tensor  # (B, H, T, S, Dv) sum over the span of alpha * value, float32 (float64 for float64 inputs)
    mass: Tensor  # (B, H, T, S) sum of alpha inside each span
    total_mass: Tensor  # (B, H, T) sum of alpha over all visible keys; below 1 under attention sinks
    lse: Tensor  # (B, H, T) natural-log softmax normaliser, sinks included
    argmax: Tensor  # (B, H, T) int64 slot of the largest alpha, -1 where a row sees nothing
    visible: Tensor  # (B, T) int64 number of visible keys
    span_visible: Tensor  # (B, T, S) int64 number of visible keys inside each span
