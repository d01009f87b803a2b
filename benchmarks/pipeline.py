"""The baseline: what the public LOCOS code does for one layer, one answer step after another.

Per step: transformers' own eager attention for one query row (which repeats keys and values for every query head), then
values repeated again, the contribution of every position, and its sum inside and outside the needle. Left out, all in
its favour: the direction W_O^T u is given instead of recomputed per step and layer, the attention weights are not sent
to the CPU and back, and steps that are not part of the answer are not run. Counted against it: the head output, which
eager attention computes with the weights and a model needs anyway (NOTES.md compares again with that added to ours).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from benchmarks.geometries import NEEDLE
from benchmarks.problem import Problem


class Step(NamedTuple):
    """Row t of the answer and the keys [first, last) that its cache holds."""

    t: int
    first: int
    last: int


def steps(problem: Problem) -> list[Step]:
    case, window = problem.case, problem.case.geometry.window
    lasts = range(case.first_row + 1, case.n_keys + 1)
    return [Step(t, 0 if window is None else max(0, last - window), last) for t, last in enumerate(lasts)]


def step_weights(problem: Problem, step: Step) -> Tensor:
    """(H, keys) attention weights of one row."""
    layer = SimpleNamespace(num_key_value_groups=problem.group, training=False)
    keys, values = (x[:, :, step.first : step.last] for x in (problem.key, problem.value))
    row = problem.query[:, :, step.t : step.t + 1]
    _, weights = eager_attention_forward(layer, row, keys, values, None, scaling=problem.scale)
    return weights[0, :, 0]


def step_terms(problem: Problem, step: Step, weights: Tensor) -> tuple[Tensor, Tensor]:
    """L+ and L- of one row, (H,) each, from its attention weights (H, keys)."""
    values = problem.value[0, :, step.first : step.last].repeat_interleave(problem.group, dim=0)  # (H, keys, D)
    direction = problem.direction[0, :, step.t].to(values.dtype)  # (H, D)
    phi = weights * torch.einsum("hnd,hd->hn", values, direction)
    start, end = (slot - step.first for slot in problem.case.needle)
    inside = phi[:, start:end].sum(-1)
    outside = (phi.sum(-1) - inside) * (NEEDLE / (step.last - step.first - NEEDLE))
    return inside.float(), outside.float()


def from_queries(problem: Problem) -> tuple[Tensor, Tensor]:
    """L+ and L-, (1, H, T) each, from queries, keys and values."""
    terms = [step_terms(problem, step, step_weights(problem, step)) for step in steps(problem)]
    return _join(terms)


def from_weights(problem: Problem) -> tuple[Tensor, Tensor]:
    """L+ and L-, (1, H, T) each, from attention weights that the model returned."""
    terms = [step_terms(problem, step, problem.attn[0, :, step.t, step.first : step.last]) for step in steps(problem)]
    return _join(terms)


def _join(terms: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inside, outside = zip(*terms, strict=True)
    return torch.stack(inside, dim=-1)[None], torch.stack(outside, dim=-1)[None]
