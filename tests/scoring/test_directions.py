"""Directions: the answer token's unembedding row, and what each head must write to point along it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from locos_fast.models.architecture import UnsupportedModelError, attention_layers
from locos_fast.scoring import directions
from locos_fast.scoring.directions import Target, pull_back, token_directions
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import FAMILIES, build

HIDDEN, WIDTH, STEPS = 37, 53, 3  # odd, and neither a multiple of a block


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one not full."""
    monkeypatch.setattr(directions, "BLOCK", 16)


class Int8Linear(nn.Module):
    """A weight-only quantised projection: integers and one scale per output, and nothing to read but its forward."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.in_features = WIDTH
        self.register_buffer("codes", torch.randint(-127, 128, (HIDDEN, WIDTH), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(HIDDEN, 1, dtype=dtype) / 64)
        self.bias = nn.Parameter(torch.randn(HIDDEN, dtype=dtype)) if bias else None

    @property
    def dequantised(self) -> Tensor:
        return self.codes.to(self.scales.dtype) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised, self.bias)


class Doubled(nn.Linear):
    """Stands for adapters: a Linear by type, but its forward is not its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(x, self.weight)


def weight_of(projection: nn.Module) -> Tensor:
    """The map of `projection`, (hidden, width) float64, read from where each kind keeps it."""
    if isinstance(projection, Int8Linear):
        return projection.dequantised.double()
    if isinstance(projection, Conv1D):
        return projection.weight.double().T
    return projection.weight.double() * (2 if isinstance(projection, Doubled) else 1)


def assert_within_rounding(projection: nn.Module, direction: Tensor, *, pushed_bias: float = 0.0) -> None:
    """A sum of n products in some dtype is off by less than n ulp of the sum of their magnitudes.

    pushed_bias: a projection that is pushed through adds its bias in its own dtype before it can be taken off again,
    which costs an ulp of weight + bias for each.
    """
    actual, weight = pull_back(projection, direction), weight_of(projection)
    size = direction.double().abs() @ weight.abs()
    bound = HIDDEN * torch.finfo(direction.dtype).eps * size
    if pushed_bias:
        eps = torch.finfo(projection.bias.dtype).eps
        bound = bound + eps * (size + pushed_bias * direction.double().abs().sum(-1, keepdim=True))
    assert actual.shape == (STEPS, WIDTH)
    assert actual.dtype == direction.dtype
    assert ((actual.double() - direction.double() @ weight).abs() <= bound).all()


def random_direction(dtype: torch.dtype) -> Tensor:
    return torch.randn(STEPS, HIDDEN, dtype=torch.promote_types(dtype, torch.float32))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


# --- pull_back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_projections_are_read_without_their_bias(dtype: torch.dtype, bias: bool) -> None:
    assert_within_rounding(nn.Linear(WIDTH, HIDDEN, bias=bias, dtype=dtype), random_direction(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d_projections_keep_their_weight_transposed(dtype: torch.dtype) -> None:
    projection = Conv1D(HIDDEN, WIDTH).to(dtype)
    nn.init.normal_(projection.bias)  # zero by default
    assert_within_rounding(projection, random_direction(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_projection_that_is_only_a_forward_is_pushed_through(dtype: torch.dtype) -> None:
    assert_within_rounding(Int8Linear(dtype, bias=False), random_direction(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_of_a_projection_that_is_pushed_through_is_taken_off(dtype: torch.dtype) -> None:
    projection = Int8Linear(dtype, bias=True)
    bias = float(projection.bias.detach().abs().max())
    assert_within_rounding(projection, random_direction(dtype), pushed_bias=bias)


def test_a_projection_without_any_floating_point_number_is_pushed_through() -> None:
    """Some keep their scales packed beside the codes; they compute in the dtype they are given."""
    projection = Int8Linear(torch.float32, bias=False)
    scales = projection.scales
    del projection.scales
    projection.scales = scales  # an attribute now, neither parameter nor buffer
    assert not any(x.is_floating_point() for x in (*projection.parameters(), *projection.buffers()))
    assert_within_rounding(projection, random_direction(torch.float32))


def test_a_linear_layer_with_another_forward_is_not_read_by_its_weight() -> None:
    projection = Doubled(WIDTH, HIDDEN)
    assert_within_rounding(
        projection, random_direction(torch.float32), pushed_bias=float(projection.bias.detach().abs().max())
    )


def test_a_projection_of_unknown_width_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="input width of output projection Sequential"):
        pull_back(nn.Sequential(nn.Linear(WIDTH, HIDDEN)), random_direction(torch.float32))


def test_pulling_back_needs_no_gradients() -> None:
    for projection in (nn.Linear(WIDTH, HIDDEN), Int8Linear(torch.float32, bias=True)):
        assert not pull_back(projection, random_direction(torch.float32)).requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_of_all_heads_give_what_the_projection_writes_along_the_token(family: str) -> None:
    """sum over heads of w . o = d . (projection(o) - bias), in float64 to the rounding of 64 products."""
    model = build(family, dtype=torch.float64)
    target = token_directions(model, Target(torch.tensor([3, 1, 3])))
    for layer in attention_layers(model):
        w = pull_back(layer.projection, target)
        output = torch.randn(w.shape, dtype=torch.float64)
        with torch.no_grad():
            written = layer.projection(output) - layer.projection(torch.zeros_like(output))
        torch.testing.assert_close((w * output).sum(-1), (target * written).sum(-1), rtol=0, atol=1e-12)


# --- token_directions


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_points_along_its_unembedding_row(dtype: torch.dtype) -> None:
    model, ids = build("llama", dtype=dtype), torch.tensor([5, 0, 5])
    target = token_directions(model, Target(ids))
    assert target.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(target, model.lm_head.weight[ids].to(target.dtype))
    assert not target.requires_grad


def test_a_model_without_unembedding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
        token_directions(build("llama").model, Target(torch.tensor([1])))


def test_an_unembedding_of_integers_is_refused() -> None:
    model = build("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="Linear keeps no floating-point unembedding rows"):
        token_directions(model, Target(torch.tensor([1])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_parts_of_a_direction_add_up_to_it(dtype: torch.dtype) -> None:
    """Also where its entries are far beyond or below what float16 can say, and where a row is zero."""
    torch.manual_seed(0)
    direction = torch.randn(4, HIDDEN) * torch.tensor([[1.0], [1e9], [1e-9], [0.0]])
    parts = directions.in_parts(direction, dtype)
    assert {part.dtype for part in parts} == {dtype}
    scaled = sum(part.double() for part in parts) * directions.row_scale(direction)
    error = (scaled - direction).abs().amax(-1)
    assert torch.all(error <= 2.0**-23 * direction.abs().amax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_multiplies_half_precision_weights_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    projection = nn.Linear(4096, 1024, bias=False, dtype=dtype, device="cuda")
    direction = torch.randn(8, 1024, device="cuda") * torch.logspace(-6, 6, 8, device="cuda")[:, None]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product = pull_back(projection, direction)
    assert torch.cuda.max_memory_allocated() - before < projection.weight.nbytes / 4  # no float32 copy
    exact = direction.double() @ projection.weight.double()
    size = direction.double().abs() @ projection.weight.double().abs()
    assert torch.all((product - exact).abs() <= 16 * 2.0**-24 * size)
