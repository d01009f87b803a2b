"""Everything that is timed: one function per provider, from a `Problem` to the terms of the LOCOS score."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import pipeline
from benchmarks.geometries import NEEDLE, Case
from benchmarks.problem import Problem
from locos_fast.ops import Contributions, attention_contribution, attention_summary, ov_contribution


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
    run: Callable[[Problem], Terms]
    bytes_read: Callable[[Case], int]  # inputs that any implementation of this path reads at least once
    absent: Callable[[str], str | None] = lambda device: None  # why it cannot run on a device
    ours: bool = False
    constant_memory: bool = False  # extra memory must not grow with the context
    remark: str = ""


def terms(problem: Problem, span: Tensor, total: Tensor) -> Terms:
    """(1, H, T) sums inside the needle and over all keys to the two terms of the score."""
    scale = NEEDLE / (problem.visible - NEEDLE)[:, None]  # (1, 1, T)
    return Terms(span, scale * (total - span), total)


def by_pipeline(problem: Problem) -> Terms:
    return Terms(*pipeline.from_queries(problem))


def by_pipeline_from_weights(problem: Problem) -> Terms:
    return Terms(*pipeline.from_weights(problem))


def by_contribution(backend: str) -> Callable[[Problem], Terms]:
    def run(problem: Problem) -> Terms:
        sums = attention_contribution(
            problem.query,
            problem.key,
            problem.value,
            problem.direction,
            problem.spans,
            problem.visibility,
            backend=backend,
        )
        return _terms_of(problem, sums)

    return run


def by_summary(backend: str) -> Callable[[Problem], Terms]:
    def run(problem: Problem) -> Terms:
        summary = attention_summary(
            problem.query, problem.key, problem.value, problem.spans, problem.visibility, backend=backend
        )
        span = (summary.span_output[..., 0, :] * problem.direction).sum(-1)
        return terms(problem, span, (problem.output * problem.direction).sum(-1))

    return run


def by_ov(backend: str) -> Callable[[Problem], Terms]:
    def run(problem: Problem) -> Terms:
        sums = ov_contribution(
            problem.attn,
            problem.value,
            problem.direction,
            problem.spans,
            visible=problem.visible,
            backend=backend,
        )
        return _terms_of(problem, sums)

    return run


def by_sdpa(problem: Problem) -> Terms:
    """One fused attention for all rows of a key/value head, projected: a bound from below, it has no needle sum."""
    seen = slice(problem.case.first_key, None)
    query, key, value = problem.stacked(problem.query), problem.key[:, :, seen], problem.value[:, :, seen]
    output = scaled_dot_product_attention(query, key, value, attn_mask=problem.row_mask, scale=problem.scale)
    return Terms(None, None, (output.reshape(problem.query.shape) * problem.direction).sum(-1))


def by_flex(problem: Problem) -> Terms:
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
    return terms_from_lse(problem, output, aux.lse)


def by_flash(problem: Problem) -> Terms:
    """FlashAttention's kernel for head output and log-sum-exp, then as with flex_attention."""
    window = problem.case.geometry.window
    output, lse, _ = import_module("flash_attn").flash_attn_func(
        *(x.transpose(1, 2) for x in (problem.query, problem.key, problem.value)),  # (1, T or N, heads, D)
        softmax_scale=problem.scale,
        causal=True,  # the last row sees the last key
        window_size=(-1, -1) if window is None else (window - 1, 0),
        return_attn_probs=True,  # which also returns the log-sum-exp
    )
    return terms_from_lse(problem, output.transpose(1, 2), lse)


def terms_from_lse(problem: Problem, output: Tensor, lse: Tensor) -> Terms:
    """The terms from head outputs (1, H, T, D) and log-sum-exps (1, H, T), with a second look at the needle's keys."""
    start, end = problem.case.needle
    scores = problem.stacked(problem.query).float() @ problem.key[:, :, start:end].float().mT * problem.scale
    alpha = (scores - problem.stacked(lse[..., None])).exp()
    projected = problem.stacked(problem.direction) @ problem.value[:, :, start:end].float().mT
    span = (alpha * projected).sum(-1).reshape(lse.shape)
    return terms(problem, span, (output * problem.direction).sum(-1))


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
    Provider("pipeline", Task.QUERIES, by_pipeline, keys_and_values),
    Provider(
        "torch.attention_contribution",
        Task.QUERIES,
        by_contribution("torch"),
        keys_and_values,
        ours=True,
        constant_memory=True,
    ),
    Provider(
        "torch.attention_summary",
        Task.QUERIES,
        by_summary("torch"),
        keys_only,
        ours=True,
        constant_memory=True,
        remark=GIVEN_OUTPUT,
    ),
    Provider(
        "triton.attention_contribution",
        Task.QUERIES,
        by_contribution("triton"),
        keys_and_values,
        needs_triton,
        ours=True,
    ),
    Provider(
        "triton.attention_summary",
        Task.QUERIES,
        by_summary("triton"),
        keys_only,
        needs_triton,
        ours=True,
        remark=GIVEN_OUTPUT,
    ),
    Provider("flex_attention", Task.QUERIES, by_flex, keys_and_values, needs_flex_lse),
    Provider("flash_attention", Task.QUERIES, by_flash, keys_and_values, needs_flash),
    Provider("sdpa.total", Task.QUERIES, by_sdpa, keys_and_values, remark=TOTAL_ONLY),
    Provider("pipeline.weights", Task.WEIGHTS, by_pipeline_from_weights, weights_and_values),
    Provider(
        "torch.ov_contribution",
        Task.WEIGHTS,
        by_ov("torch"),
        weights_and_values,
        ours=True,
        constant_memory=True,
    ),
    Provider("triton.ov_contribution", Task.WEIGHTS, by_ov("triton"), weights_and_values, needs_triton, ours=True),
)

BASELINES = {Task.QUERIES: "pipeline", Task.WEIGHTS: "pipeline.weights"}


def _terms_of(problem: Problem, sums: Contributions) -> Terms:
    return terms(problem, sums.span[..., 0], sums.total)
