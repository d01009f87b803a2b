"""The Triton kernels and the torch backend on a GPU: the error bound in every dtype and at full length, equal bits, no
waiting host.

With TRITON_INTERPRET=1 what needs no GPU runs on the CPU, in Triton's interpreter; `make test` runs some of it that way
(`interpreter/test_gpu_suite.py`), all of it takes an hour.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from locos_fast.ops import Visibility
from tests.oracles.attention_problem import (
    LAYOUTS,
    Problem,
    WeightsProblem,
    far_apart,
    random_problem,
    random_weights_problem,
)
from tests.oracles.error_bound import assert_positions_within_bound, contribution_bound, summary_bound, weights_bound

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter computes both sides of tl.where, NumPy warns of the one that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning") if INTERPRETED else pytest.mark.gpu

needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA or ROCm device")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG = 131_072
GIB = 2**30
LONG_ANSWER = pytest.param(40, 8, marks=pytest.mark.slow)  # in the interpreter; on a GPU all of these tests run
MODELS = {  # as their attention layers hand keys and values over, and a number of answer rows
    "Qwen3-8B": {"group": 4, "kv_heads": 8, "head_dim": 128, "rows": 8},
    "Qwen2.5-7B": {"group": 7, "kv_heads": 4, "head_dim": 128, "rows": 3},
    "Llama-3.2-3B": {"group": 3, "kv_heads": 8, "head_dim": 128, "rows": 5},
    "Gemma-3-4B": {"group": 2, "kv_heads": 4, "head_dim": 256, "rows": 4},
}


def need_memory(gib: float) -> None:
    if INTERPRETED:
        pytest.skip("too long for the interpreter")
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def causal(rows: int, keys: int, **options) -> Visibility:
    """The last rows of a context."""
    return Visibility.causal(torch.arange(keys - rows, keys, device=DEVICE), **options)


def assert_kernels_within_bound(problem: Problem) -> None:
    contribution_bound(problem).check(problem.contributions("triton"))
    summary_bound(problem).check(problem.summary("triton"))


def assert_identical(a: tuple, b: tuple) -> None:
    for ours, theirs in zip(a, b, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


# the error bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_torch_backend_is_within_the_error_bound_too(dtype):
    """It stands in where the kernels do not go: float64, and contributions of every position."""
    keys = 2000
    options = {"dtype": dtype, "batch": 2, "group": 3, "rows": 5, "spans": [(0, 1), (700, 1100)], "device": DEVICE}
    problem = random_problem(keys=keys, visibility=causal(5, keys, window=1500), **options)
    contribution_bound(problem).check(problem.contributions("torch"))
    summary_bound(problem).check(problem.summary("torch"))
    assert_positions_within_bound(problem, "torch")
    weights = random_weights_problem(keys=keys, **options)
    weights_bound(weights).check(weights.contributions("torch"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim, value_dim", [(16, 16), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256), (512, 512)]
)
def test_every_width_is_within_the_error_bound(dtype, head_dim, value_dim):
    keys = 1500
    problem = random_problem(
        dtype=dtype,
        batch=2,
        group=5,
        head_dim=head_dim,
        value_dim=value_dim,
        rows=7,
        keys=keys,
        spans=[(0, 1), (500, 530), (100, keys), (keys - 1, keys + 5)],
        visibility=causal(7, keys),
        device=DEVICE,
    )
    assert_kernels_within_bound(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, group", [(1, 1), (1, 8), (3, 3), (9, 7), LONG_ANSWER])
def test_every_number_of_rows_is_within_the_error_bound(dtype, rows, group):
    keys = 777
    problem = random_problem(
        dtype=dtype, group=group, head_dim=128, rows=rows, keys=keys, visibility=causal(rows, keys), device=DEVICE
    )
    assert_kernels_within_bound(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_read_any_layout(dtype, layout):
    problem = random_problem(
        dtype=dtype, batch=2, head_dim=64, keys=300, layout=layout, visibility=causal(4, 300), device=DEVICE
    )
    assert_kernels_within_bound(problem)
    weights = random_weights_problem(dtype=dtype, batch=2, value_dim=64, keys=300, layout=layout, device=DEVICE)
    weights_bound(weights).check(weights.contributions("triton"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once(dtype):
    batch, keys, rows = 3, 1100, 5
    visibility = causal(
        rows,
        keys,
        window=900,
        left_padding=torch.tensor([0, 60, 1099], device=DEVICE),
        key_mask=torch.rand(batch, keys, device=DEVICE) < 0.8,
    )
    problem = random_problem(
        dtype=dtype,
        batch=batch,
        group=7,
        rows=rows,
        keys=keys,
        head_dim=80,
        value_dim=48,
        layout="fused",
        spans=torch.randint(0, 1000, (batch, 40, 1)) + torch.tensor([0, 90]),
        visibility=visibility,
        scale=2 * 80**-0.5,
        softcap=1.5,
        sinks=True,
        device=DEVICE,
    )
    assert_kernels_within_bound(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_long_contexts_are_within_the_error_bound(model, dtype):
    need_memory(40)  # the definition in float64 repeats keys and values for every head
    sizes = MODELS[model]
    spans = [(100, 140), (LONG // 2, LONG // 2 + 3000), (0, LONG)]
    visibility = causal(sizes["rows"], LONG)
    problem = random_problem(
        **sizes, dtype=dtype, keys=LONG, spans=spans, visibility=visibility, layout="transposed", device=DEVICE
    )
    assert_kernels_within_bound(problem)


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_weights_of_a_long_context_are_within_the_error_bound(dtype):
    need_memory(40)
    spans = [(100, 140), (LONG // 2, LONG // 2 + 3000), (0, LONG)]
    problem = random_weights_problem(
        kv_heads=8, group=4, value_dim=128, rows=8, dtype=dtype, keys=LONG, spans=spans, device=DEVICE
    )
    weights_bound(problem).check(problem.contributions("triton"))


@pytest.mark.parametrize("dtype, kept_bits", [(torch.float16, 22), (torch.bfloat16, 16)])
def test_half_precision_directions_lose_nothing(dtype, kept_bits):
    """The bound holds with a naive run in float32 on the same values; the two halves of a direction, scaled to its
    largest entry, add 2^-bits of that entry to every product."""
    problem = random_problem(
        dtype=dtype, head_dim=128, keys=700, spans=[(0, 700), (30, 45)], visibility=causal(4, 700), device=DEVICE
    )
    bound = contribution_bound(problem, torch.float32)
    largest = problem.direction.abs().amax(-1, keepdim=True).expand_as(problem.direction)
    lost = contribution_bound(problem._replace(value=problem.value.abs(), direction=largest)).truth
    for name in ("span", "total"):
        bound.allowed[name] += 2.0**-kept_bits * lost[name]
    bound.check(problem.contributions("triton"))


@needs_gpu
def test_auto_is_triton_on_a_gpu():
    problem = random_problem(dtype=torch.float16, visibility=causal(4, 67), device=DEVICE)
    assert_identical(problem.contributions("auto"), problem.contributions("triton"))


# bits ----------------------------------------------------------------------------------------------------------------


def long_problem(**changes) -> Problem:
    sizes = {"dtype": torch.bfloat16, "keys": 20_000, "rows": 8, "group": 4, "kv_heads": 8, "head_dim": 128} | changes
    spans = [(100, 140), (19_000, 20_000), (0, 20_000)]
    visibility = causal(8, 20_000, left_padding=torch.arange(sizes.get("batch", 1), device=DEVICE) * 700)
    return random_problem(**sizes, spans=spans, visibility=visibility, device=DEVICE)


def test_repeated_runs_give_equal_bits():
    """A race would show as bits that differ now and then."""
    problem = long_problem()
    contributions, summary = problem.contributions("triton"), problem.summary("triton")
    for _ in range(50):
        assert_identical(problem.contributions("triton"), contributions)
        assert_identical(problem.summary("triton"), summary)


def test_the_batch_changes_no_bit_of_a_row():
    problem = long_problem(batch=3)
    for function in ("contributions", "summary"):
        together = getattr(problem, function)("triton")
        for b in range(3):
            alone = getattr(problem.only(b), function)("triton")
            assert_identical(tuple(x[b : b + 1] for x in together), alone)


# offsets beyond 32 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "key"])
def test_keys_and_values_may_lie_beyond_2_31_elements(dim):
    need_memory(12)
    problem = random_problem(
        dtype=torch.float16, batch=2, head_dim=128, keys=700, visibility=causal(4, 700), device=DEVICE
    )
    key, value = far_apart(problem.key, problem.value, dim)
    far = problem._replace(key=key, value=value)
    assert_identical(problem.contributions("triton"), far.contributions("triton"))
    assert_identical(problem.summary("triton"), far.summary("triton"))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_queries_and_weights_may_lie_beyond_2_31_elements(dim):
    need_memory(12)
    problem = random_problem(dtype=torch.float16, batch=2, keys=700, visibility=causal(4, 700), device=DEVICE)
    query, _ = far_apart(problem.query, problem.query, dim)
    assert_identical(problem.contributions("triton"), problem._replace(query=query).contributions("triton"))
    assert_identical(problem.summary("triton"), problem._replace(query=query).summary("triton"))
    weights: WeightsProblem = random_weights_problem(dtype=torch.float16, batch=2, keys=700, device=DEVICE)
    attn, _ = far_apart(weights.attn, weights.attn, dim)
    assert_identical(weights.contributions("triton"), weights._replace(attn=attn).contributions("triton"))


# the host ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """PyTorch raises wherever the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weights_problem() -> WeightsProblem:
    return random_weights_problem(
        dtype=torch.bfloat16, keys=3000, value_dim=128, spans=[(10, 40), (0, 3000)], device=DEVICE
    )


@needs_gpu
def test_the_host_never_waits_for_the_device():
    """With spans given as Python ints, after a first call that compiles the kernels and copies the table of spans."""
    problem, weights = long_problem(sinks=True, softcap=1.5), weights_problem()
    calls = (problem.contributions, problem.summary, weights.contributions)
    for call in calls:
        call("triton")
    with waiting_is_an_error():
        for call in calls:
            call("triton")


@needs_gpu
def test_a_cuda_graph_replays_the_call():
    """Captured once, replayed on other values in the same memory."""
    problem, weights = long_problem(), weights_problem()
    other = long_problem()
    for call in (problem.contributions, problem.summary, weights.contributions):
        call("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.contributions("triton"), problem.summary("triton"), weights.contributions("triton")
    for ours, theirs in zip(problem[:4], other[:4], strict=True):
        ours.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    expected = other.contributions("triton"), other.summary("triton"), weights.contributions("triton")
    for replayed, called in zip(results, expected, strict=True):
        assert_identical(replayed, called)


@needs_gpu
def test_memory_is_a_small_share_of_the_keys_and_values():
    """Per split and row the kernels leave 16 bytes, per span and tile 12 for each row: below a sixteenth of K and V."""
    problem = random_problem(
        **MODELS["Qwen3-8B"],
        dtype=torch.bfloat16,
        keys=LONG,
        spans=[(100, 140), (0, LONG)],
        visibility=causal(8, LONG),
        device=DEVICE,
    )
    for call in (problem.contributions, problem.summary):
        call("triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call("triton")
        assert torch.cuda.max_memory_allocated() - before <= (problem.key.nbytes + problem.value.nbytes) / 16
