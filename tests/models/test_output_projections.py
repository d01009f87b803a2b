"""A quantised or adapted output projection, which is not its weight, is scored as its plain twin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.architecture import (
    attention_layers,
)
from locos_fast.scoring.directions import NORMS
from locos_fast.scoring.score import score_tokens
from tests.oracles.architecture_models import build
from tests.oracles.definition import ANSWER, LENGTH, SCORES, distance
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import tokens

IDENTITY = 1e-6  # transformers' norms and softmax compute in float32, also in a float64 model
DEFINITION = 1e-5  # of the largest magnitude
NEEDLE = (10, 20)

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is not available")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


class Int8Projection(nn.Module):
    """Weight-only quantised: integers, a scale per output, and nothing to read but its forward."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self.register_buffer("scales", weight.abs().amax(-1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scales).round().to(torch.int8))
        self.offset = bias

    def plain(self) -> nn.Linear:
        return linear(self.codes * self.scales, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scales, self.offset)


class AdaptedProjection(nn.Module):
    """A low-rank adapter, which shows the weight and bias of its base as PEFT's do."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.base, self.in_features = linear(weight, bias), weight.shape[1]
        self.down, self.up = nn.Linear(weight.shape[1], 3, bias=False), nn.Linear(3, weight.shape[0])
        self.to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def plain(self) -> nn.Linear:
        bias = self.up.bias if self.bias is None else self.bias + self.up.bias
        return linear(self.weight + self.up.weight @ self.down.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    shape = weight.T.shape
    module = nn.utils.skip_init(nn.Linear, *shape, bias=bias is not None, dtype=weight.dtype)  # no random numbers
    module.load_state_dict({"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()}))
    return module


def replace_projections(
    model: PreTrainedModel, kind: type[Int8Projection] | type[AdaptedProjection], *, plain: bool
) -> None:
    for layer in attention_layers(model):
        weight = layer.projection.weight.detach()
        weight = weight if isinstance(layer.projection, nn.Linear) else weight.T  # Conv1D
        name = next(name for name, child in layer.module.named_children() if child is layer.projection)
        odd = kind(weight, layer.projection.bias)
        setattr(layer.module, name, odd.plain() if plain else odd)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [Int8Projection, AdaptedProjection])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "gpt_oss", "qwen3_next", "cohere2"])
def test_a_projection_that_is_not_its_weight_equals_its_plain_twin(
    family: str, kind: type[Int8Projection] | type[AdaptedProjection], norm: str
) -> None:
    ids, scores = tokens(1, LENGTH), []
    for plain in (False, True):
        model = build(family)
        torch.manual_seed(1)  # the same adapter in both
        replace_projections(model, kind, plain=plain)
        scores.append(score_tokens(model, ids, NEEDLE, ANSWER, norm=norm, verify=True))
    odd, twin = scores
    assert distance(odd, {name: getattr(twin, name) for name in SCORES}) <= DEFINITION
    if norm == "frozen":
        assert odd.meta["completeness"]["overall"] <= IDENTITY
        assert max(odd.meta["completeness"]["layers"].values()) <= IDENTITY
