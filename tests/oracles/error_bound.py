"""The one error bound of every backend, as an assertion.

    |backend - f64|  <=  2 * max|naive - f64|  +  8 * 2^-24 * size

f64 is the definition (`ops.reference`) in float64; naive is the definition in the dtype of the inputs with the
direction cast to it: what a careful user would accept. The maximum runs over the whole array of a field, and over a
naive run in float32 too, because results are float32: in half precision the mass of a whole row rounds to exactly 1, an
accident that no float32 result can match. `size` is what a float32 computation may round, entry by entry:

    span, total           sum_j alpha_j c_j (|w| . |v_j|)        c_j = 1 + scale |q| . |k_j|
    span_output           sum_j alpha_j c_j |v_j|
    mass, total_mass      sum_j alpha_j c_j
    lse                   |lse| + sum_j alpha_j c_j
    any, weights given    the same with c_j = 1

c_j is 1 for the sum itself, and the rest for the scores: a float32 dot product is off by a share of |q| . |k_j| that
depends on the order of its terms, and exp makes that absolute error a relative one of alpha_j. (Without it no two
float32 matrix products agree within the bound: 8 * 2^-24 is two units in the last place of a score of 8.)

For float64 inputs naive and f64 are one; there 2^-40 takes the place of 8 * 2^-24: no result is reached in more than
2^13 operations that each round to 2^-53 (head_dim + value_dim + keys of a test stay below that).

Key counts are exact. Any slot may be the argmax whose float64 weight lies within the bound of the largest weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.ops import Contributions, Summary, reference
from locos_fast.ops.arguments import span_table
from locos_fast.ops.attention import Attention
from tests.oracles.attention_problem import Problem, WeightsProblem


class Bound(NamedTuple):
    """The float64 results of one problem and how far a backend may be from them."""

    truth: dict[str, Tensor]  # float64 fields
    allowed: dict[str, Tensor]  # of the same shapes
    counts: dict[str, Tensor]  # integer fields, argmax apart
    weights: Tensor  # (B, H, T, N) float64 alpha
    shortfall: Tensor  # (B, H, T) by how much the weight at argmax may fall short of the largest
    seen: Tensor  # (B, 1 or H, T, N) bool
    kv_offset: int

    def check(self, actual: Contributions | Summary) -> None:
        for name, truth in self.truth.items():
            assert_within(getattr(actual, name), truth, self.allowed[name], name)
        for name, count in self.counts.items():
            result = getattr(actual, name)
            assert result.dtype == torch.int64, name
            assert torch.equal(result, count), f"{name}: expected {count.tolist()}, got {result.tolist()}"
        self._check_argmax(actual.argmax)

    def _check_argmax(self, argmax: Tensor) -> None:
        assert argmax.dtype == torch.int64
        some = self.seen.any(-1).expand_as(argmax)
        assert torch.equal(argmax == -1, ~some), "argmax is -1 exactly where nothing is visible"
        column = torch.where(some, argmax - self.kv_offset, 0)[..., None]
        assert (column >= 0).all() and (column < self.weights.shape[-1]).all(), "argmax is a slot that is present"
        hidden = ~self.seen.expand_as(self.weights).gather(-1, column)[..., 0]
        assert not (hidden & some).any(), "argmax is visible"
        short = self.weights.amax(-1) - self.weights.gather(-1, column)[..., 0]
        assert (short <= self.shortfall).all(), f"argmax misses the largest weight by {short.max():.3g}"


def contribution_bound(problem: Problem, naive_dtype: torch.dtype | None = None) -> Bound:
    """The bound of `attention_contribution`; the naive run takes the dtype of the inputs if `naive_dtype` is None."""
    return _attention_bound("attention_contribution", problem, naive_dtype)


def summary_bound(problem: Problem, naive_dtype: torch.dtype | None = None) -> Bound:
    """The bound of `attention_summary`."""
    return _attention_bound("attention_summary", problem, naive_dtype)


def weights_bound(problem: WeightsProblem, naive_dtype: torch.dtype | None = None) -> Bound:
    """The bound of `ov_contribution`; its weights are given, so that argmax is exact."""
    batch, _, rows, n_keys = problem.attn.shape
    table = span_table(problem.spans, batch).to(problem.attn.device)

    def run(*inputs: Tensor) -> Contributions:
        return reference.ov_contribution(*inputs, table)

    naive = [run(*(x.to(dtype) for x in problem[:3])) for dtype in _naive_dtypes(problem.attn, naive_dtype)]
    exact = [x.double() for x in problem[:3]]
    size = run(*(x.abs() for x in exact))._asdict()
    inside = reference.span_mask(table, 0, n_keys).sum(-1)  # (B or 1, S)
    counts = {
        "visible": torch.full((batch, rows), n_keys, device=table.device),
        "span_visible": inside[:, None].expand(batch, rows, -1),
    }
    fields, allowed = _allowed(naive, run(*exact), size, unit(problem.attn.dtype))
    exactly = torch.zeros((), dtype=torch.float64, device=table.device)
    return Bound(fields, allowed, counts, exact[0], exactly, exact[0] > 0, 0)


def assert_positions_within_bound(problem: Problem, backend: str) -> None:
    """The bound of `position_contribution`: no sum, so that `size` is that of the one position."""
    truth = _run("position_contribution", problem, torch.float64)
    naive = [_run("position_contribution", problem, dtype) for dtype in _naive_dtypes(problem.query, None)]
    size = _terms(problem, _weights(problem, torch.float64)) * _projected(problem)
    allowed = 2 * max((run - truth).abs().max() for run in naive) + unit(problem.query.dtype) * size
    assert_within(problem.positions(backend), truth, allowed, "phi")


def unit(dtype: torch.dtype) -> float:
    """The share of `size` that rounding may take."""
    return 2.0**-40 if dtype == torch.float64 else 8 * 2.0**-24


def assert_within(actual: Tensor, truth: Tensor, allowed: Tensor, name: str) -> None:
    assert actual.shape == truth.shape, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}"
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].double(), truth[~finite]), f"{name}: infinities differ"
    error, allowed = (actual.double() - truth)[finite].abs(), allowed[finite]
    assert allowed.isfinite().all(), f"{name}: the naive run overflows, the bound says nothing"
    share = float((error / allowed.clamp_min(1e-300)).max()) if error.numel() else 0.0
    assert (error <= allowed).all(), f"{name}: error {error.max():.3g}, {share:.3g} times what is allowed"


def _attention_bound(function: str, problem: Problem, naive_dtype: torch.dtype | None) -> Bound:
    query, key, visibility = problem.query, problem.key, problem.visibility
    dtypes = _naive_dtypes(query, naive_dtype)
    truth = _run(function, problem, torch.float64)
    weights = _weights(problem, torch.float64)
    size = _sizes(function, problem, weights, truth.lse)
    fields, allowed = _allowed([_run(function, problem, dtype) for dtype in dtypes], truth, size, unit(query.dtype))

    naive_error = max((_weights(problem, dtype) - weights).abs().max() for dtype in dtypes)
    shortfall = 2 * naive_error + unit(query.dtype) * _terms(problem, weights).amax(-1)
    seen = visibility.mask(query.shape[0], key.shape[2])  # (B, T, N)
    return Bound(fields, allowed, _key_counts(problem, seen), weights, shortfall, seen[:, None], visibility.kv_offset)


def _allowed(
    naive: list[NamedTuple], truth: NamedTuple, size: dict[str, Tensor], rounding: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float64 fields, and the error allowed in every entry of them."""
    fields, allowed = {}, {}
    for name, exact in truth._asdict().items():
        if exact is None or not exact.is_floating_point():
            continue
        finite = exact.isfinite()
        errors = torch.stack([(getattr(run, name).double() - exact)[finite].abs() for run in naive])
        fields[name] = exact
        allowed[name] = 2 * (errors.max() if errors.numel() else 0.0) + rounding * size[name]
    return fields, allowed


def _run(function: str, problem: Problem, dtype: torch.dtype) -> Contributions | Summary | Tensor:
    """A function of `reference` on the inputs in `dtype`."""
    query, key, value, direction = (x.to(dtype) for x in problem[:4])
    options = problem.options | {"scale": _scale(problem)}
    attention = Attention(query, key, value, problem.visibility, **options)
    spans = span_table(problem.spans, query.shape[0]).to(query.device)
    if function == "position_contribution":
        return reference.position_contribution(attention, direction)
    if function == "attention_summary":
        return reference.attention_summary(attention, spans)
    return reference.attention_contribution(attention, direction, spans)


def _naive_dtypes(inputs: Tensor, naive_dtype: torch.dtype | None) -> set[torch.dtype]:
    return {naive_dtype or inputs.dtype, reference.result_dtype(inputs)}


def _scale(problem: Problem) -> float:
    return problem.query.shape[-1] ** -0.5 if problem.scale is None else problem.scale


def _weights(problem: Problem, dtype: torch.dtype) -> Tensor:
    """(B, H, T, N) alpha from scores computed in `dtype`, as float64."""
    query, key = problem.query.to(dtype), problem.key.to(dtype)
    scores = reference.attention_scores(query, key, problem.visibility, scale=_scale(problem), softcap=problem.softcap)
    return reference.attention_weights(scores, reference.softmax_normaliser(scores, problem.sinks)).double()


def _terms(problem: Problem, weights: Tensor) -> Tensor:
    """(B, H, T, N) alpha_j c_j."""
    key = reference.repeat_kv(problem.key.double().abs(), problem.query.shape[1])
    return weights * (1 + problem.query.double().abs() @ key.mT * abs(_scale(problem)))


def _projected(problem: Problem) -> Tensor:
    """(B, H, T, N) |w| . |v_j|."""
    value = reference.repeat_kv(problem.value.double().abs(), problem.query.shape[1])
    return problem.direction.double().abs() @ value.mT


def _sizes(function: str, problem: Problem, weights: Tensor, lse: Tensor) -> dict[str, Tensor]:
    terms = _terms(problem, weights)
    span_terms = terms[..., None, :] * _inside(problem)[:, None, None]  # (B, H, T, S, N)
    sizes = {"mass": span_terms.sum(-1), "total_mass": terms.sum(-1), "lse": lse.abs() + terms.sum(-1)}
    if function == "attention_summary":
        value = reference.repeat_kv(problem.value.double().abs(), problem.query.shape[1])
        return sizes | {"span_output": torch.einsum("bhtsn,bhnd->bhtsd", span_terms, value)}
    projected = _projected(problem)
    return sizes | {
        "span": torch.einsum("bhtsn,bhtn->bhts", span_terms, projected),
        "total": (terms * projected).sum(-1),
    }


def _inside(problem: Problem) -> Tensor:
    """(B or 1, S, N) bool: which columns lie inside which span."""
    table = span_table(problem.spans, problem.query.shape[0]).to(problem.query.device)
    return reference.span_mask(table, problem.visibility.kv_offset, problem.key.shape[2])


def _key_counts(problem: Problem, seen: Tensor) -> dict[str, Tensor]:
    """Visible keys per row and per span, counted in the dense mask rather than computed from its ends."""
    return {"visible": seen.sum(-1), "span_visible": (seen[:, :, None] & _inside(problem)[:, None]).sum(-1)}
