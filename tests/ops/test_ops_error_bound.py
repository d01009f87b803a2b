"""Every backend on the CPU is within the error bound, on random problems, long contexts and extreme values."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locos_fast.ops import torch_backend
from tests.oracles.attention_cases import cases, weights_cases
from tests.oracles.attention_problem import random_problem, random_weights_problem
from tests.oracles.error_bound import assert_positions_within_bound, contribution_bound, summary_bound, weights_bound
from tests.oracles.threads import one_thread

BACKENDS = ("torch", "reference")
BLOCKS = st.sampled_from([16, 100, torch_backend.BLOCK])  # keys per block, so that short contexts too need several
AT_ONCE = st.sampled_from(
    [1, 2, torch_backend.HEADS_PER_THREAD]
)  # heads, so that three need turns, even and uneven ones


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def copies(tensors):
    return [x.clone() for x in tensors]


def assert_unchanged(tensors, before):
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@given(cases(), BLOCKS, AT_ONCE)
@settings(max_examples=250)
def test_attention_contribution_is_within_the_error_bound(case, block, heads):
    problem = case.problem()
    before = copies(problem.tensors)
    bound = contribution_bound(problem)
    with mock.patch.multiple(torch_backend, BLOCK=block, HEADS_PER_THREAD=heads):
        for backend in BACKENDS:
            bound.check(problem.contributions(backend))
    assert_unchanged(problem.tensors, before)


@given(cases(), BLOCKS, AT_ONCE)
@settings(max_examples=250)
def test_attention_summary_is_within_the_error_bound(case, block, heads):
    problem = case.problem()
    before = copies(problem.tensors)
    bound = summary_bound(problem)
    with mock.patch.multiple(torch_backend, BLOCK=block, HEADS_PER_THREAD=heads):
        for backend in BACKENDS:
            bound.check(problem.summary(backend))
    assert_unchanged(problem.tensors, before)


@given(weights_cases(), BLOCKS, AT_ONCE)
@settings(max_examples=150)
def test_ov_contribution_is_within_the_error_bound(case, block, heads):
    problem = case.problem()
    before = copies(problem.tensors)
    bound = weights_bound(problem)
    with mock.patch.multiple(torch_backend, BLOCK=block, HEADS_PER_THREAD=heads):
        for backend in BACKENDS:
            bound.check(problem.contributions(backend))
    assert_unchanged(problem.tensors, before)


@given(cases(), BLOCKS, AT_ONCE)
@settings(max_examples=100)
def test_position_contribution_is_within_the_error_bound(case, block, heads):
    problem = case.problem()
    with mock.patch.multiple(torch_backend, BLOCK=block, HEADS_PER_THREAD=heads):
        for backend in BACKENDS:
            assert_positions_within_bound(problem, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_lose_nothing(dtype):
    """The bound holds with a naive run in float32 on the same values: neither direction nor alpha is rounded."""
    problem = random_problem(dtype=dtype, batch=2, rows=5, keys=501, head_dim=80, spans=[(0, 501), (7, 90)])
    contribution_bound(problem, torch.float32).check(problem.contributions("torch"))
    summary_bound(problem, torch.float32).check(problem.summary("torch"))
    weights = random_weights_problem(dtype=dtype, batch=2, rows=5, keys=501, value_dim=80)
    weights_bound(weights, torch.float32).check(weights.contributions("torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_contexts_are_within_the_error_bound(dtype):
    """Several blocks of the size in use; spans of everything, over the edge of a block, and of the last key."""
    keys = 4 * torch_backend.BLOCK + 77
    spans = [(0, keys), (torch_backend.BLOCK - 5, torch_backend.BLOCK + 5), (keys - 1, keys)]
    problem = random_problem(dtype=dtype, keys=keys, spans=spans, softcap=1.5, sinks=True)
    contribution_bound(problem).check(problem.contributions("torch"))
    summary_bound(problem).check(problem.summary("torch"))
    weights = random_weights_problem(dtype=dtype, keys=keys, spans=spans, kv_heads=1, group=1, rows=1)
    weights_bound(weights).check(weights.contributions("torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_token_may_be_a_span_of_its_own_beside_spans_of_everything(dtype):
    keys = torch_backend.BLOCK + 333
    spans = [(0, keys), *((j, j + 1) for j in range(keys)), (5, keys - 5)]
    problem = random_problem(dtype=dtype, keys=keys, rows=2, head_dim=16, spans=spans)
    sums = problem.contributions("torch")
    contribution_bound(problem).check(sums)
    positions = problem.positions("torch")
    # the same products in two orders: each differs by up to 1e-6 of itself in ten problems like this one
    torch.testing.assert_close(sums.span[..., 1:-1], positions, rtol=1e-5, atol=1e-9)


NAN_KEYS = (3, 20, 870)


@pytest.mark.parametrize("block", [16, 32, torch_backend.BLOCK])
def test_a_nan_spoils_its_rows_alone_and_has_no_slot(block):
    problem = random_problem(batch=3, kv_heads=2, group=2, rows=2, keys=900, dtype=torch.float32)
    for batch, key in enumerate(NAN_KEYS):
        problem.key[batch, 0, key] = torch.nan
    with mock.patch.object(torch_backend, "BLOCK", block):
        for result in (problem.contributions("torch"), problem.summary("torch")):
            assert result.lse[:, :2].isnan().all() and result.lse[:, 2:].isfinite().all()
            assert (result.argmax[:, :2] == -1).all() and (result.argmax[:, 2:] >= 0).all()


def test_scores_far_below_zero_are_seen():
    """A row's largest score may be any finite number: hidden keys alone are minus infinity."""
    problem = random_problem(dtype=torch.float32, rows=1, keys=70)
    problem.query[:] = -1e16
    problem.key[:] = 1e18
    for result in (problem.contributions("torch"), problem.summary("torch")):
        torch.testing.assert_close(result.total_mass, torch.ones_like(result.total_mass))
        assert (result.argmax == 0).all() and result.lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_changes_nothing(dtype):
    problem = random_problem(dtype=torch.float32, spans=[(3, 40)])
    weights = random_weights_problem(dtype=torch.float32, spans=[(3, 40)])
    calls = (problem.contributions, problem.summary, problem.positions, weights.contributions)
    for call, backend in itertools.product(calls, BACKENDS):
        plain = call(backend)
        with torch.autocast("cpu", dtype=dtype):
            under = call(backend)
        torch.testing.assert_close(under, plain, rtol=0, atol=0)
