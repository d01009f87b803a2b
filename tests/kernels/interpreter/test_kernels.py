"""The Triton kernels in Triton's interpreter: the error bound of `tests/oracles/error_bound.py` on few, short problems.

A tile of the interpreter holds 32 rows and 32 keys, a split 512 keys.
"""

import pytest
import torch

from locos_fast import ops
from locos_fast.kernels import tiles
from locos_fast.ops import Visibility, triton_partials
from tests.oracles.attention_problem import (
    LAYOUTS,
    Problem,
    WeightsProblem,
    far_apart,
    random_problem,
    random_tensor,
    random_weights_problem,
)
from tests.oracles.error_bound import contribution_bound, summary_bound, weights_bound

# the interpreter computes both sides of tl.where, NumPy warns of the one that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = (HALF, BRAIN, SINGLE)
SPLIT, TILE = tiles.SPLIT, 32


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products here are small; threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_kernels_within_bound(problem: Problem) -> None:
    contribution_bound(problem).check(problem.contributions("triton"))
    summary_bound(problem).check(problem.summary("triton"))


def assert_identical(a: tuple, b: tuple) -> None:
    for ours, theirs in zip(a, b, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


# shapes --------------------------------------------------------------------------------------------------------------

SHAPES = {
    "one key": {"dtype": SINGLE, "keys": 1, "group": 1, "rows": 1},
    "fewer keys than a tile": {"dtype": HALF, "keys": 17, "rows": 2, "batch": 2, "value_dim": 40},
    "less than a split": {"dtype": SINGLE, "keys": SPLIT - 1, "group": 1, "rows": 3, "head_dim": 80},
    "a split": {"dtype": HALF, "keys": SPLIT, "group": 1, "rows": 3, "head_dim": 96},
    "more than a split, two row blocks": {"dtype": SINGLE, "keys": SPLIT + 1, "group": 7, "rows": 5, "kv_heads": 1},
    "three splits, three row blocks": {"dtype": HALF, "keys": 1100, "group": 8, "rows": 9, "kv_heads": 1},
    "wide float32, taken in parts": {"dtype": SINGLE, "keys": 70, "head_dim": 128, "value_dim": 96},
    "wide float16": {"dtype": HALF, "keys": 70, "head_dim": 128, "value_dim": 80},
    "widest float16, taken in parts": {"dtype": HALF, "keys": 40, "group": 1, "head_dim": 512, "value_dim": 264},
    "output in two chunks, float32": {"dtype": SINGLE, "keys": 33, "value_dim": 144},
    "output in two chunks, float16": {"dtype": HALF, "keys": 33, "value_dim": 256},
    "more than a split, bfloat16": {"dtype": BRAIN, "keys": SPLIT + 1, "group": 7, "rows": 5, "kv_heads": 1},
    "wide bfloat16": {"dtype": BRAIN, "keys": 70, "head_dim": 128, "value_dim": 80},
    "widest bfloat16, taken in parts": {"dtype": BRAIN, "keys": 40, "group": 1, "head_dim": 512, "value_dim": 264},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_kernels_are_within_the_error_bound(shape):
    keys = shape["keys"]
    spans = [(0, 1), (keys - 1, keys), (keys // 3, keys // 2 + 5), (0, keys), (keys, keys + 9)]
    assert_kernels_within_bound(random_problem(**shape, spans=spans))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ov_kernel_is_within_the_error_bound(shape):
    shape = {name: size for name, size in shape.items() if name != "head_dim"}
    keys = shape["keys"]
    spans = [(0, 1), (keys - 1, keys), (keys // 3, keys // 2 + 5), (0, keys), (keys, keys + 9)]
    problem = random_weights_problem(**shape, spans=spans)
    weights_bound(problem).check(problem.contributions("triton"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_read_any_layout(layout):
    problem = random_problem(dtype=HALF, batch=2, rows=3, keys=35, head_dim=24, value_dim=16, layout=layout)
    assert_kernels_within_bound(problem)
    weights = random_weights_problem(dtype=HALF, batch=2, rows=3, keys=35, value_dim=24, layout=layout)
    weights_bound(weights).check(weights.contributions("triton"))


@pytest.mark.parametrize("head_dim", [80, 272])  # multiplied at once, and in parts
def test_half_precision_inputs_lose_nothing(head_dim):
    """The bound holds with a naive run in float32 on the same values: neither direction nor alpha is rounded to half.

    A float16 high and low half of the direction keep 22 bits together, an error below the 2^-21 that the bound allows.
    """
    spans = [(0, 100), (30, 45)]
    problem = random_problem(dtype=HALF, keys=100, head_dim=head_dim, spans=spans)
    contribution_bound(problem, SINGLE).check(problem.contributions("triton"))
    summary_bound(problem, SINGLE).check(problem.summary("triton"))
    weights = random_weights_problem(dtype=HALF, keys=100, value_dim=head_dim, spans=spans)
    weights_bound(weights, SINGLE).check(weights.contributions("triton"))


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_float16_directions_of_any_size_lose_nothing(size):
    """A direction far outside float16's range: it is scaled to 1 before it is split into halves."""
    problem = random_problem(dtype=HALF, keys=40)
    problem = problem._replace(direction=problem.direction * size)
    contribution_bound(problem, SINGLE).check(problem.contributions("triton"))


# spans ---------------------------------------------------------------------------------------------------------------


def overlapping_spans() -> list[tuple[int, int]]:
    """38 spans that all reach into the first tile, unsorted, some of them twice, and two elsewhere."""
    start, length = torch.randint(0, 30, (36,)).tolist(), torch.randint(1, 60, (36,)).tolist()
    spans = [(a, a + n) for a, n in zip(start, length, strict=True)]
    return [(50, 51), *spans, spans[7], spans[3], (64, 99)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_spans_in_a_tile_than_are_unrolled(dtype):
    spans = overlapping_spans()
    assert_kernels_within_bound(random_problem(dtype=dtype, rows=3, keys=99, spans=spans))
    weights = random_weights_problem(dtype=dtype, rows=3, keys=99, spans=spans)
    weights_bound(weights).check(weights.contributions("triton"))


def test_the_order_of_spans_changes_no_bit():
    spans = overlapping_spans()
    problem = random_problem(keys=99, spans=spans)
    result, reverse = (problem._replace(spans=x).contributions("triton") for x in (spans, spans[::-1]))
    assert torch.equal(result.span, reverse.span.flip(-1))
    assert torch.equal(result.mass, reverse.mass.flip(-1))
    assert torch.equal(result.span[..., 8], result.span[..., -3])  # one of the two that are given twice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_batch_row_may_have_its_own_spans(dtype):
    spans = torch.tensor([[[60, 70], [10, 40], [0, 1]], [[0, 70], [70, 90], [33, 34]]])
    assert_kernels_within_bound(random_problem(dtype=dtype, batch=2, keys=70, spans=spans))
    weights = random_weights_problem(dtype=dtype, batch=2, keys=70, spans=spans)
    weights_bound(weights).check(weights.contributions("triton"))


def test_a_span_in_a_tile_that_nobody_sees_counts_as_zero():
    """No program writes the sums of such a tile."""
    visibility = Visibility.causal(torch.tensor([200, 201]), window=20)
    problem = random_problem(rows=2, keys=202, spans=[(0, 10), (40, 202), (100, 101)], visibility=visibility)
    assert_kernels_within_bound(problem)
    assert (problem.contributions("triton").mass[..., [0, 2]] == 0).all()


# visibility ----------------------------------------------------------------------------------------------------------


def seen_by_causal(rows: int, keys: int, **options) -> Visibility:
    offset = options.get("kv_offset", 0)
    return Visibility.causal(torch.arange(offset + keys - rows, offset + keys), **options)


VISIBILITIES = {
    "window and offset": seen_by_causal(4, 90, kv_offset=1000, window=37),
    "chunk and left padding": seen_by_causal(4, 90, chunk=32, left_padding=torch.tensor([0, 51])),
    "holes": seen_by_causal(4, 90, key_mask=torch.rand(2, 90, generator=torch.manual_seed(0)) < 0.4),
    "holes everywhere": seen_by_causal(4, 90, key_mask=torch.zeros(2, 90, dtype=torch.bool)),
    "rows in any order, per batch row": Visibility.causal(torch.tensor([[89, 0, 31, 32], [5, 88, 200, 64]])),
    "rows that see nothing": Visibility(torch.tensor([0, 40, 90, 95]), torch.tensor([90, 40, 99, 99])),
    "nobody sees anything": Visibility(torch.tensor([5, 5, 5, 5]), torch.tensor([5, 0, 5, 5])),
}


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
def test_kernels_see_what_each_row_sees(visibility, sinks):
    offset = visibility.kv_offset
    spans = [(offset, offset + 90), (offset + 20, offset + 70), (3, 9)]
    assert_kernels_within_bound(
        random_problem(dtype=HALF, batch=2, kv_heads=1, keys=90, spans=spans, visibility=visibility, sinks=sinks)
    )


def test_splits_that_a_row_does_not_see_are_empty():
    """Three splits: one row sees the first only, one the last only, one all, one nothing."""
    visibility = Visibility(torch.tensor([0, 1050, 0, 9]), torch.tensor([100, 1100, 1100, 9]))
    spans = [(40, 60), (500, 1060)]
    for dtype in DTYPES:
        assert_kernels_within_bound(
            random_problem(dtype=dtype, kv_heads=1, group=1, keys=1100, spans=spans, visibility=visibility)
        )


def test_more_splits_than_one_round_combines(monkeypatch):
    monkeypatch.setattr(triton_partials, "COMBINED_AT_ONCE", 2)
    spans = [(0, 1100), (40, 60)]
    assert_kernels_within_bound(random_problem(kv_heads=1, group=1, rows=2, keys=1100, spans=spans, sinks=True))
    weights = random_weights_problem(kv_heads=1, group=1, rows=2, keys=1100, spans=spans)
    weights_bound(weights).check(weights.contributions("triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(dtype):
    batch, keys, offset = 2, 530, 37
    visibility = seen_by_causal(
        5,
        keys,
        kv_offset=offset,
        window=500,
        left_padding=torch.tensor([0, 60]),
        key_mask=torch.rand(batch, keys) < 0.8,
    )
    problem = random_problem(
        dtype=dtype,
        batch=batch,
        kv_heads=1,
        group=7,
        rows=5,
        keys=keys,
        head_dim=80,
        value_dim=48,
        layout="fused",
        spans=torch.randint(0, 500, (batch, 5, 1)) + torch.tensor([0, 90]),
        visibility=visibility,
        scale=2 * 80**-0.5,
        softcap=1.5,
        sinks=True,
    )
    assert_kernels_within_bound(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_bites(dtype):
    capped = random_problem(dtype=dtype, keys=65, scale=1.0, softcap=1.5)
    assert_kernels_within_bound(capped)
    assert not torch.allclose(
        capped.contributions("triton").lse, capped._replace(softcap=None).contributions("triton").lse
    )


def test_sinks_may_be_strided_and_of_half_precision():
    problem = random_problem(keys=20, sinks=True)
    strided = torch.stack([problem.sinks, problem.sinks + 5], -1)
    assert_kernels_within_bound(problem._replace(sinks=strided[:, 1]))
    assert_kernels_within_bound(problem._replace(sinks=problem.sinks.half()))


# bits ----------------------------------------------------------------------------------------------------------------


def test_repeated_runs_give_equal_bits():
    problem = random_problem(dtype=HALF, keys=SPLIT + 30, kv_heads=1, spans=[(0, 90), (500, 530)])
    assert_identical(problem.contributions("triton"), problem.contributions("triton"))
    assert_identical(problem.summary("triton"), problem.summary("triton"))


def test_the_batch_changes_no_bit_of_a_row():
    """Each batch row alone gives the bits it gives beside others that see other keys."""
    visibility = seen_by_causal(4, 90, left_padding=torch.tensor([0, 70]))
    problem = random_problem(dtype=HALF, batch=2, keys=90, spans=[(0, 90), (60, 75)], visibility=visibility)
    for function in ("contributions", "summary"):
        together = getattr(problem, function)("triton")
        for b in range(2):
            alone = getattr(problem.only(b), function)("triton")
            assert_identical([x[b : b + 1] for x in together], alone)


def test_keys_after_the_last_visible_one_change_no_bit():
    """Splits are fixed in keys, so that the length of the context does not move them."""
    problem = random_problem(dtype=HALF, kv_heads=1, keys=600, spans=[(0, 90), (500, 600)])
    more = random_tensor((1, 1, 450, 16), HALF)
    longer = problem._replace(
        key=torch.cat([problem.key, more], 2),
        value=torch.cat([problem.value, more], 2),
    )
    assert_identical(problem.contributions("triton"), longer.contributions("triton"))
    assert_identical(problem.summary("triton"), longer.summary("triton"))


# offsets beyond 32 bits ----------------------------------------------------------------------------------------------


def far_or_skip(first: torch.Tensor, second: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return far_apart(first, second, dim)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "key"])
def test_keys_and_values_may_lie_beyond_2_31_elements(dim):
    problem = random_problem(dtype=HALF, batch=2, group=1, keys=20)
    key, value = far_or_skip(problem.key, problem.value, dim)
    far = problem._replace(key=key, value=value)
    assert_identical(problem.contributions("triton"), far.contributions("triton"))
    assert_identical(problem.summary("triton"), far.summary("triton"))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_queries_and_weights_may_lie_beyond_2_31_elements(dim):
    problem = random_problem(dtype=HALF, batch=2, group=1, keys=20)
    query, _ = far_or_skip(problem.query, problem.query, dim)
    assert_identical(problem.contributions("triton"), problem._replace(query=query).contributions("triton"))
    assert_identical(problem.summary("triton"), problem._replace(query=query).summary("triton"))
    weights: WeightsProblem = random_weights_problem(dtype=HALF, batch=2, group=1, keys=20)
    attn, _ = far_or_skip(weights.attn, weights.attn, dim)
    assert_identical(weights.contributions("triton"), weights._replace(attn=attn).contributions("triton"))


def test_inputs_are_unchanged():
    problem = random_problem(dtype=HALF, keys=40, sinks=True, softcap=1.5)
    before = [x.clone() for x in problem.tensors]
    problem.contributions("triton"), problem.summary("triton")
    assert all(torch.equal(x, y) for x, y in zip(problem.tensors, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [80, 96, 272])
def test_lanes_beyond_the_head_dim_are_never_read(width, dtype):
    """They belong to other tensors, or to nobody: here they are NaN, which even a weight of zero would let through."""

    def inside_nan(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        whole = torch.full((*shape, width + 64), torch.nan, dtype=dtype)
        whole[..., :width] = torch.randn(*shape, width)
        return whole[..., :width]

    query, key, value = inside_nan(1, 2, 2), inside_nan(1, 1, 35), inside_nan(1, 1, 35)
    direction = inside_nan(1, 2, 2, dtype=torch.float32)
    visibility, spans = ops.Visibility.causal(torch.tensor([20, 34])), [(0, 5), (30, 35)]
    weights = torch.rand(1, 2, 2, 35).softmax(-1).to(dtype)
    for backend in ("torch", "triton"):
        sums = ops.attention_contribution(query, key, value, direction, spans, visibility, backend=backend)
        summary = ops.attention_summary(query, key, value, spans, visibility, backend=backend)
        given = ops.ov_contribution(weights, value, direction, spans, backend=backend)
        for tensor in (sums.span, sums.total, sums.lse, summary.span_output, summary.lse, given.span, given.total):
            assert tensor.isfinite().all()
