"""Nothing is timed before every provider has computed the same numbers as the definition in float64.

    |provider - f64|  <=  2 * max|naive - f64|  +  8 * 2^-24 * size

f64 is `ops.reference` in float64; naive is the same in the dtype of the case, and in float32 (as results are);
size is sum_j alpha_j c_j (|w| . |v_j|) over the keys of the sum, c_j = 1 + scale |q| . |k_j|: what float32 may round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.geometries import Case, Geometry
from benchmarks.problem import Problem
from benchmarks.providers import PROVIDERS, Provider, Terms, terms
from locos_fast.ops import reference
from locos_fast.ops.arguments import span_table
from locos_fast.ops.attention import Attention

SMALL = (
    Geometry("small", 8, 2, 64),
    Geometry("small, window", 8, 4, 64, window=256),
)
SMALL_CONTEXT, SMALL_ROWS = 777, 5
UNIT = 8 * 2.0**-24


class Check(NamedTuple):
    """How far a provider was from float64 on one small case."""

    provider: str
    case: Case
    worst: float  # largest share of the allowed error; above 1 is a failure
    error: str = ""  # what it raised instead

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0  # False for NaN


def check_all(device: str, dtypes: Iterable[torch.dtype]) -> Iterator[Check]:
    """Every provider that can run on the device, on every small case."""
    for dtype in dtypes:
        for geometry in SMALL:
            problem = Problem(Case(geometry, SMALL_CONTEXT, SMALL_ROWS, dtype), device)
            truth, allowed = bound(problem)
            for provider in PROVIDERS:
                if provider.absent(device) is None:
                    yield check(provider, problem, truth, allowed)


def check(provider: Provider, problem: Problem, truth: Terms, allowed: Terms) -> Check:
    """One provider on one case; an exception is a failed check."""
    try:
        return Check(provider.name, problem.case, worst_share(provider, problem, truth, allowed))
    except Exception as error:
        return Check(provider.name, problem.case, math.nan, f"{type(error).__name__}: {error}")


@torch.inference_mode()
def worst_share(provider: Provider, problem: Problem, truth: Terms, allowed: Terms) -> float:
    """Largest error of a provider as a share of what is allowed."""
    shares = []
    for result, exact, limit in zip(provider.terms(problem), truth, allowed, strict=True):
        if result is not None:
            shares.append(((result.double() - exact).abs() / limit).max())
    return float(torch.stack(shares).max())


@torch.inference_mode()
def bound(problem: Problem) -> tuple[Terms, Terms]:
    """The float64 terms and the error allowed in each entry of them."""
    truth = naive_terms(problem, torch.float64)
    naive = [naive_terms(problem, dtype) for dtype in {problem.case.dtype, torch.float32}]
    size = rounding(problem)
    allowed = []
    for index, exact in enumerate(truth):
        error = max((run[index].double() - exact).abs().max() for run in naive)
        allowed.append(2 * error + UNIT * size[index])
    return truth, Terms(*allowed)


def naive_terms(problem: Problem, dtype: torch.dtype) -> Terms:
    """The definition in `dtype`."""
    query, key, value, direction = (x.to(dtype) for x in (problem.query, problem.key, problem.value, problem.direction))
    spans = span_table(problem.spans, 1).to(problem.device)
    attention = Attention(query, key, value, problem.visibility, problem.scale)
    sums = reference.attention_contribution(attention, direction, spans)
    return terms(problem, sums.span[..., 0], sums.total)


def rounding(problem: Problem) -> Terms:
    """`size` of each term, (1, H, T) float64."""
    query, key, value, direction = (x.double() for x in (problem.query, problem.key, problem.value, problem.direction))
    heads = query.shape[1]
    scores = reference.attention_scores(query, key, problem.visibility, scale=problem.scale)
    alpha = reference.attention_weights(scores, reference.softmax_normaliser(scores))
    grown = 1 + query.abs() @ reference.repeat_kv(key.abs(), heads).mT * problem.scale
    each: Tensor = alpha * grown * (direction.abs() @ reference.repeat_kv(value.abs(), heads).mT)
    start, end = problem.case.needle
    inside, everything = each[..., start:end].sum(-1), each.sum(-1)
    return terms(problem, inside, everything + 2 * inside)._replace(total=everything)  # L-: both sums round
