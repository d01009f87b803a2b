"""The tensor functions on the CPU: what must hold between their results."""

import itertools
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from locos_fast import ops
from locos_fast.ops import Visibility, reference, torch_backend
from tests.oracles.attention_problem import Problem, random_problem, random_weights_problem
from tests.oracles.threads import one_thread

BACKENDS = ("torch", "reference")


IDENTITY = 2.0**-40  # float64, at most 2^13 roundings: two ways to compute one number differ by this share of its terms


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def exact_problem(**changes) -> Problem:
    """A float64 problem in which two batch rows have causal rows, a window, a hole and a span at either end."""
    batch, keys, kv_offset = 2, 131, 9
    key_mask = torch.ones(batch, keys, dtype=torch.bool)
    key_mask[0, 50:60] = False
    visibility = Visibility.causal(torch.tensor([139, 70, 12]), kv_offset=kv_offset, window=90, key_mask=key_mask)
    arguments = {
        "batch": batch,
        "rows": 3,
        "keys": keys,
        "value_dim": 24,
        "dtype": torch.float64,
        "spans": [(9, 20), (60, 75), (139, 140)],
        "visibility": visibility,
    }
    return random_problem(**arguments | changes)


def identical(result: torch.Tensor, expected: torch.Tensor, terms: float = 100.0) -> bool:
    """Equal up to float64 rounding of terms of that size."""
    return bool(((result - expected).abs() <= IDENTITY * terms).all())


def head_outputs(problem: Problem) -> torch.Tensor:
    """(B, H, T, Dv) by PyTorch's own attention."""
    mask = problem.visibility.mask(problem.query.shape[0], problem.key.shape[2])[:, None]
    return scaled_dot_product_attention(*problem[:3], attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_total_equals_direction_dot_head_output(backend):
    problem = exact_problem()
    expected = (problem.direction * head_outputs(problem)).sum(-1)
    assert identical(problem.contributions(backend).total, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_span_output_over_everything_is_the_head_output(backend):
    problem = exact_problem(spans=[(0, 1000)])
    assert identical(problem.summary(backend).span_output[..., 0, :], head_outputs(problem))


@pytest.mark.parametrize("backend", BACKENDS)
def test_span_over_everything_equals_total(backend):
    result = exact_problem(spans=[(0, 1000)], sinks=True, softcap=1.0).contributions(backend)
    assert identical(result.span[..., 0], result.total)
    assert identical(result.mass[..., 0], result.total_mass)
    assert torch.equal(result.span_visible[..., 0], result.visible)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_partition_into_spans_sums_to_total(backend):
    cuts = [0, 1, 9, 10, 64, 65, 139, 500]
    result = exact_problem(spans=list(itertools.pairwise(cuts)), sinks=True).contributions(backend)
    assert identical(result.span.sum(-1), result.total)
    assert identical(result.mass.sum(-1), result.total_mass)
    assert torch.equal(result.span_visible.sum(-1), result.visible)


@pytest.mark.parametrize("backend", BACKENDS)
def test_summary_and_contributions_agree(backend):
    problem = exact_problem(sinks=True, softcap=1.0)
    summary, contributions = problem.summary(backend), problem.contributions(backend)
    projected = torch.einsum("bhtsd,bhtd->bhts", summary.span_output, problem.direction)
    assert identical(projected, contributions.span)
    for name in ("mass", "total_mass", "lse"):
        assert identical(getattr(summary, name), getattr(contributions, name))
    for name in ("argmax", "visible", "span_visible"):
        assert torch.equal(getattr(summary, name), getattr(contributions, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_contributions_sum_to_spans(backend):
    problem = exact_problem(sinks=True)
    phi, result = problem.positions(backend), problem.contributions(backend)
    offset = problem.visibility.kv_offset
    for index, (start, end) in enumerate(problem.spans):
        assert identical(phi[..., start - offset : end - offset].sum(-1), result.span[..., index])
    assert identical(phi.sum(-1), result.total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_weights_and_their_queries_and_keys_agree(backend):
    """`ov_contribution` of the weights that PyTorch's softmax gives is `attention_contribution`."""
    problem = exact_problem()
    offset = problem.visibility.kv_offset
    scores = problem.query @ reference.repeat_kv(problem.key, 6).mT * problem.query.shape[-1] ** -0.5
    seen = problem.visibility.mask(2, problem.key.shape[2])[:, None]
    attn = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = problem.contributions(backend)
    columns = [(start - offset, end - offset) for start, end in problem.spans]
    result = ops.ov_contribution(
        attn, problem.value, problem.direction, columns, visible=expected.visible, backend=backend
    )
    for name in ("span", "total", "mass", "total_mass"):
        assert identical(getattr(result, name), getattr(expected, name)), name
    assert torch.equal(result.argmax + offset, expected.argmax)
    assert result.visible is expected.visible
    assert result.lse is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_equal_repeated_keys_and_values(backend):
    grouped = exact_problem(group=3)
    repeated = grouped._replace(key=reference.repeat_kv(grouped.key, 6), value=reference.repeat_kv(grouped.value, 6))
    ours, theirs = grouped.contributions(backend), repeated.contributions(backend)
    assert identical(ours.span, theirs.span)
    assert identical(ours.lse, theirs.lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_nobody_sees_do_not_matter(backend):
    problem = exact_problem()
    unseen = ~problem.visibility.mask(2, problem.key.shape[2]).any(1)[:, None, :, None]  # (B, 1, N, 1)
    assert unseen.any()
    other = problem._replace(key=torch.where(unseen, 1e4, problem.key), value=torch.where(unseen, -1e4, problem.value))
    for name, result in problem.contributions(backend)._asdict().items():
        assert torch.equal(result, getattr(other.contributions(backend), name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rolling_cache_gives_the_same_results(backend):
    """Columns that no row sees may be absent: what counts is the slot, not the column."""
    whole = exact_problem()
    dropped, offset = 15, whole.visibility.kv_offset
    visibility = Visibility.causal(torch.tensor([139, 139, 138]), kv_offset=offset, window=100)
    whole = whole._replace(visibility=visibility)
    rolled = whole._replace(
        key=whole.key[:, :, dropped:],
        value=whole.value[:, :, dropped:],
        visibility=visibility._replace(kv_offset=offset + dropped),
    )
    ours, theirs = whole.contributions(backend), rolled.contributions(backend)
    for name in ("span", "total", "mass", "lse"):
        assert identical(getattr(ours, name), getattr(theirs, name)), name
    for name in ("argmax", "visible", "span_visible"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_batch_row_may_have_its_own_spans(backend):
    own = torch.tensor([[[10, 30], [100, 140]], [[60, 61], [9, 140]]])
    problem = exact_problem(spans=own)
    together = problem.contributions(backend)
    for b in range(2):
        alone = problem.only(b)._replace(spans=[tuple(pair) for pair in own[b].tolist()]).contributions(backend)
        assert identical(together.span[b], alone.span[0])
        assert torch.equal(together.span_visible[b], alone.span_visible[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_spans_give_equal_bits(backend):
    problem = exact_problem(spans=[(20, 75), (60, 65), (20, 75)], dtype=torch.float32)
    contributions, summary = problem.contributions(backend), problem.summary(backend)
    assert torch.equal(contributions.span[..., 0], contributions.span[..., 2])
    assert torch.equal(summary.span_output[..., 0, :], summary.span_output[..., 2, :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_hides_needle(backend):
    """A window of w slots, the row's own included, begins at slot p - w + 1: 73 slots hide 20..25 from row 98."""
    needle, positions = (20, 26), torch.tensor([98, 99])

    def windowed(window: int | None) -> Problem:
        visibility = Visibility.causal(positions, window=window)
        return random_problem(keys=100, rows=2, spans=[needle], visibility=visibility)

    assert (windowed(None).contributions(backend).span_visible == 6).all()
    assert windowed(74).contributions(backend).span_visible.flatten().tolist() == [1, 0]
    contributions, summary = windowed(73).contributions(backend), windowed(73).summary(backend)
    for hidden in (contributions.span, contributions.mass, contributions.span_visible, summary.span_output):
        assert (hidden == 0).all()
    assert (contributions.argmax >= 26).all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_has_no_sums(backend, sinks):
    visibility = Visibility(torch.tensor([0, 40, 67]), torch.tensor([67, 40, 30]))
    problem = random_problem(rows=3, keys=67, spans=[(0, 67), (5, 6)], visibility=visibility, sinks=sinks)
    contributions, summary = problem.contributions(backend), problem.summary(backend)
    for result in (contributions, summary):
        assert (result.argmax[..., 1:] == -1).all()
        assert (result.total_mass[..., 1:] == 0).all() and (result.mass[..., 1:, :] == 0).all()
        assert (result.visible[:, 1:] == 0).all() and (result.span_visible[:, 1:] == 0).all()
        expected = problem.sinks[None, :, None] if sinks else torch.tensor(-torch.inf)
        assert torch.equal(result.lse[..., 1:], expected.expand_as(result.lse[..., 1:]))
    assert (contributions.total[..., 1:] == 0).all() and (contributions.span[..., 1:, :] == 0).all()
    assert (summary.span_output[..., 1:, :, :] == 0).all()
    assert (problem.positions(backend)[..., 1:, :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_takes_mass_and_nothing_else(backend):
    problem = exact_problem()
    plain = problem.contributions(backend)
    sunk = problem._replace(sinks=torch.full((6,), 3.0)).contributions(backend)
    share = (plain.lse - sunk.lse).exp()
    assert identical(sunk.lse, torch.logaddexp(plain.lse, torch.tensor(3.0, dtype=torch.float64)))
    assert identical(sunk.total_mass, share)
    assert identical(sunk.span, plain.span * share[..., None])
    assert torch.equal(sunk.argmax, plain.argmax)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_goes_to_the_first_key(backend):
    problem = exact_problem(dtype=torch.float32)
    problem = problem._replace(key=torch.zeros_like(problem.key))  # every score is exactly 0
    first = problem.visibility.mask(2, 131).int().argmax(-1)[:, None] + problem.visibility.kv_offset
    with mock.patch.object(torch_backend, "BLOCK", 16):
        assert torch.equal(problem.contributions(backend).argmax, first.expand(-1, 6, -1))
        assert torch.equal(problem.summary(backend).argmax, first.expand(-1, 6, -1))
    attn = torch.full((1, 2, 1, 40), 1 / 40)
    even = ops.ov_contribution(attn, torch.ones(1, 1, 40, 16), torch.ones(1, 2, 1, 16), [(0, 1)], backend=backend)
    assert (even.argmax == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_float32_or_float64_with_the_inputs(dtype, backend):
    problem, weights = random_problem(dtype=dtype), random_weights_problem(dtype=dtype)
    results = [
        *problem.contributions(backend),
        *problem.summary(backend),
        problem.positions(backend),
        *weights.contributions(backend),
    ]
    floating = {x.dtype for x in results if x is not None and x.is_floating_point()}
    assert floating == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_auto_is_torch_on_a_cpu():
    problem, weights = random_problem(), random_weights_problem()
    for function in (problem.contributions, problem.summary, weights.contributions):
        for ours, theirs in zip(function("auto"), function("torch"), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(problem.positions("auto"), problem.positions("torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_inputs_that_record_gradients_are_taken_as_numbers(backend):
    problem = random_problem(keys=40)
    expected = problem.contributions(backend)
    with_gradient = problem._replace(
        query=problem.query.clone().requires_grad_(), direction=problem.direction.clone().requires_grad_()
    )
    for ours, theirs in zip(with_gradient.contributions(backend), expected, strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
    assert not with_gradient.summary(backend).mass.requires_grad
