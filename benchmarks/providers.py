"""Everything that is timed: one function per provider, from a `Problem` to what a layer leaves behind.

The terms of the LOCOS score follow from that outside the clock: a model's layers do not compute them one by one. Counts
of keys, too, belong to the whole forward pass and are given.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import pipeline
from benchmarks.geometries import NEEDLE, Case
from benchmarks.problem import Problem
from locos_fast.ops import Contributions, Summary, attention_contribution, attention_summary, ov_contribution
from locos_fast.ops.backends import BackendName


class Terms(NamedTuple):
    """What a provider ends with, (1, H, T) each in logits; None where it cannot say."""

    l_plus: Tensor | None  # sum of phi inside the needle
    l_minus: Tensor | None  # sum of phi outside, scaled to the needle's length
    total: Tensor | None = None  # sum of phi over all keys


class Task(Enum):
    """What a provider starts from; ratios compare providers of one task."""

    QUERIES = "from queries, keys, values"
    WEIGHTS = "from attention weights, values"


class Provider(NamedTuple):
    name: str
    task: Task
    run: Callable[[Problem], Any]  # what is timed
    terms_of: Callable[[Problem, Any], Terms]  # of what `run` returned
    bytes_read: Callable[[Case], int]  # inputs that any implementation of this path reads at least once
    absent: Callable[[str], str | None] = lambda device: None  # why it cannot run on a device
    ours: bool = False
    constant_memory: bool = False  # extra memory must not grow with the context
    kernels: tuple[str, ...] = ()  # Triton kernels of one call, which are also timed alone
    remark: str = ""

    def terms(self, problem: Problem) -> Terms:
        """Run, and compute the terms."""
        return self.terms_of(problem, self.run(problem))


def terms(problem: Problem, span: Tensor, total: Tensor) -> Terms:
    """(1, H, T) sums inside the needle and over all keys to the two terms of the score."""
    scale = NEEDLE / (problem.visible - NEEDLE)[:, None]  # (1, 1, T)
    return Terms(span, scale * (total - span), total)


def both_terms(problem: Problem, found: tuple[Tensor, Tensor]) -> Terms:
    """L+ and L- of a provider that computes just these."""
    return Terms(*found)


def total_only(problem: Problem, total: Tensor) -> Terms:
    return Terms(None, None, total)


def of_sums(problem: Problem, sums: Contributions) -> Terms:
    return terms(problem, sums.span[..., 0], sums.total)


def of_summary(problem: Problem, summary: Summary) -> Terms:
    span = (summary.span_output[..., 0, :] * problem.direction).sum(-1)
    return terms(problem, span, (problem.output * problem.direction).sum(-1))


def of_needle_and_total(problem: Problem, sums: tuple[Tensor, Tensor]) -> Terms:
    return terms(problem, *sums)


def by_contribution(backend: BackendName) -> Callable[[Problem], Contributions]:
    return lambda problem: attention_contribution(direction=problem.direction, backend=backend, **problem.attention)


def by_summary(backend: BackendName) -> Callable[[Problem], Summary]:
    return lambda problem: attention_summary(backend=backend, **problem.attention)


def by_ov(backend: BackendName) -> Callable[[Problem], Contributions]:
    return lambda problem: ov_contribution(
        problem.attn, problem.value, problem.direction, problem.spans, visible=problem.visible, backend=backend
    )


def by_sdpa(problem: Problem) -> Tensor:
    """One fused attention for all rows of a key/value head, projected: a bound from below, it has no needle sum."""
    seen = slice(problem.case.first_key, None)
    query, key, value = problem.stacked(problem.query), problem.key[:, :, seen], problem.value[:, :, seen]
    output = scaled_dot_product_attention(query, key, value, attn_mask=problem.row_mask, scale=problem.scale)
    return (output.reshape(problem.query.shape) * problem.direction).sum(-1)


def by_flex(problem: Problem) -> tuple[Tensor, Tensor]:
    """flex_attention for head output and log-sum-exp, the needle's keys once more, everything projected."""
    output, aux = compiled_flex()(
        problem.query,
        problem.key,
        problem.value,
        block_mask=block_mask(problem),
        scale=problem.scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return sums_from_lse(problem, output, aux.lse)


def by_flash(problem: Problem) -> tuple[Tensor, Tensor]:
    """FlashAttention's kernel for head output and log-sum-exp, then as with flex_attention."""
    window = problem.case.geometry.window
    output, lse, _ = import_module("flash_attn").flash_attn_func(
        *(x.transpose(1, 2) for x in (problem.query, problem.key, problem.value)),  # (1, T or N, heads, D)
        softmax_scale=problem.scale,
        causal=True,  # the last row sees the last key
        window_size=(-1, -1) if window is None else (window - 1, 0),
        return_attn_probs=True,  # which also returns the log-sum-exp
    )
    return sums_from_lse(problem, output.transpose(1, 2), lse)


def sums_from_lse(problem: Problem, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of phi in the needle and over all keys, (1, H, T) each, from head outputs (1, H, T, D) and log-sum-exps
    (1, H, T), with a second look at the needle's keys."""
    start, end = problem.case.needle
    scores = problem.stacked(problem.query).float() @ problem.key[:, :, start:end].float().mT * problem.scale
    alpha = (scores - problem.stacked(lse[..., None])).exp()
    projected = problem.stacked(problem.direction) @ problem.value[:, :, start:end].float().mT
    span = (alpha * projected).sum(-1).reshape(lse.shape)
    return span, (output * problem.direction).sum(-1)


@lru_cache
def compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def block_mask(problem: Problem) -> object:
    """Built once per case: a model builds it once per forward pass, not per layer."""
    if problem.block_mask is None:
        problem.block_mask = _block_mask(problem)
    return problem.block_mask


def _block_mask(problem: Problem) -> object:
    first, last = problem.visibility.first, problem.visibility.last

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= first[row]) & (column < last[row])

    return create_block_mask(sees, 1, 1, problem.case.rows, problem.case.n_keys, device=problem.device.type)


def keys_and_values(case: Case) -> int:
    return 2 * keys_only(case)


def keys_only(case: Case) -> int:
    return case.keys_seen * case.geometry.kv_heads * case.geometry.head_dim * case.dtype.itemsize


def weights_and_values(case: Case) -> int:
    return case.geometry.heads * case.rows * case.n_keys * case.dtype.itemsize + keys_only(case)


def needs_triton(device: str) -> str | None:
    if device == "cpu":
        return "the Triton kernels need a GPU"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def needs_flex_lse(device: str) -> str | None:
    return "flex_attention gives no log-sum-exp on a CPU" if device == "cpu" else None


def needs_flash(device: str) -> str | None:
    if device == "cpu":
        return "FlashAttention needs a GPU"
    return None if importlib.util.find_spec("flash_attn") else "the package flash_attn is not installed"


GIVEN_OUTPUT = "the head output is given: the model's own forward pass computes it"
TOTAL_ONLY = "sum over all keys only, no needle sum; not a complete score"

PROVIDERS = (
    Provider("pipeline", Task.QUERIES, pipeline.from_queries, both_terms, keys_and_values),
    Provider(
        "torch.attention_contribution",
        Task.QUERIES,
        by_contribution("torch"),
        of_sums,
        keys_and_values,
        ours=True,
        constant_memory=True,
    ),
    Provider(
        "torch.attention_summary",
        Task.QUERIES,
        by_summary("torch"),
        of_summary,
        keys_only,
        ours=True,
        constant_memory=True,
        remark=GIVEN_OUTPUT,
    ),
    Provider(
        "triton.attention_contribution",
        Task.QUERIES,
        by_contribution("triton"),
        of_sums,
        keys_and_values,
        needs_triton,
        ours=True,
        kernels=("attention_contribution_split", "combine_splits", "combine_spans"),
    ),
    Provider(
        "triton.attention_summary",
        Task.QUERIES,
        by_summary("triton"),
        of_summary,
        keys_only,
        needs_triton,
        ours=True,
        kernels=("attention_summary_split", "combine_splits", "span_output"),
        remark=GIVEN_OUTPUT,
    ),
    Provider("flex_attention", Task.QUERIES, by_flex, of_needle_and_total, keys_and_values, needs_flex_lse),
    Provider("flash_attention", Task.QUERIES, by_flash, of_needle_and_total, keys_and_values, needs_flash),
    Provider("sdpa.total", Task.QUERIES, by_sdpa, total_only, keys_and_values, remark=TOTAL_ONLY),
    Provider("pipeline.weights", Task.WEIGHTS, pipeline.from_weights, both_terms, weights_and_values),
    Provider(
        "torch.ov_contribution",
        Task.WEIGHTS,
        by_ov("torch"),
        of_sums,
        weights_and_values,
        ours=True,
        constant_memory=True,
    ),
    Provider(
        "triton.ov_contribution",
        Task.WEIGHTS,
        by_ov("triton"),
        of_sums,
        weights_and_values,
        needs_triton,
        ours=True,
        kernels=("ov_contribution_split", "combine_sums", "combine_spans"),
    ),
)

BASELINES = {Task.QUERIES: "pipeline", Task.WEIGHTS: "pipeline.weights"}
