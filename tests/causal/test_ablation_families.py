"""Every mode on every supported family, against hand-made changes of the model's own eager attention function and of
what its output projections are given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.causal.ablation import MODES, ablate
from locos_fast.models.architecture import UnsupportedModelError, attention_layers, head_count
from tests.oracles import architecture_models, further_families
from tests.oracles.architecture_models import FAMILIES
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import tokens

LENGTH, NEEDLE = 27, (6, 11)
PROMPTS = [tokens(1, 9, seed=1), tokens(1, 12, seed=2)]
ROUNDING = 1e-5  # of the largest logit: eager softmax and transformers' norms work in float32
# one norm over the queries of all heads: setting one rescales the others
NORMED_TOGETHER = {"olmo2", "olmo3", "FlexOlmo", "MiniMaxM2", "Olmoe"}
BIASED_NORM = {"Persimmon"}  # of queries: of a zero query it makes its bias

pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def of_any_kind(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return architecture_models.build(family)
    return further_families.build(family, "eager", dtype=torch.float64)


def some_heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Of every layer, others in each, in a group with one that is left."""
    layers = attention_layers(model)
    return [(layer.number, head) for layer in layers for head in range(head_count(layer)) if (head + layer.number) % 3]


# --- by hand


@contextmanager
def attention_changed(change: Callable[..., tuple]) -> Iterator[None]:
    """change(original, module, query, key, value, ...) in the place of every eager attention function."""
    files = [file for name, file in sys.modules.items() if name.startswith("transformers.models.")]
    with pytest.MonkeyPatch.context() as patch:
        for file in files:
            for name, original in list(vars(file).items()):
                if name.endswith("eager_attention_forward"):
                    patch.setattr(file, name, changed(original, change))
        yield


def changed(original: Callable, change: Callable[..., tuple]) -> Callable:
    return lambda module, *args, **kwargs: change(original, module, *args, **kwargs)


def without_queries(heads: list[tuple[int, int]]) -> Callable[..., tuple]:
    def change(original: Callable, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple:
        query = query.clone()
        query[:, [head for layer, head in heads if layer == module.layer_idx]] = 0
        return original(module, query, *args, **kwargs)

    return change


def without_needle(heads: list[tuple[int, int]]) -> Callable[..., tuple]:
    def change(original: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any):
        output, weights = original(module, query, key, value, *args, **kw)
        mine = [head for layer, head in heads if layer == module.layer_idx]
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)[:, mine]
        rest = weights[:, mine].clone()
        rest[..., slice(*NEEDLE)] = 0
        left = rest.sum(-1, keepdim=True)
        if hasattr(module, "sinks"):  # they keep their share of the sum
            left += 1 - weights[:, mine].sum(-1, keepdim=True)
        rest /= left.clamp_min(1e-30)
        output = output.clone()
        output[:, :, mine] = (rest @ values).transpose(1, 2)
        return output, weights

    return change


@contextmanager
def projections_given(model: PreTrainedModel, heads: list[tuple[int, int]], instead: Callable) -> Iterator[None]:
    """instead(layer, (1, n, H, Dv)) in the heads' place."""
    with ExitStack() as hooks:
        for layer in attention_layers(model):
            mine = [head for number, head in heads if number == layer.number]

            def hook(module: nn.Module, args: tuple, layer: Any = layer, mine: list[int] = mine) -> tuple:
                x = args[0].clone()
                by_head = x.unflatten(-1, (head_count(layer), -1))
                by_head[:, :, mine] = instead(layer.number, by_head)[..., mine, :]
                return by_head.flatten(-2), *args[1:]

            hooks.callback(layer.projection.register_forward_pre_hook(hook).remove)
        yield


def head_outputs(model: PreTrainedModel) -> dict[int, Tensor]:
    """Layer -> (tokens of all prompts, H, Dv)."""
    kept: dict[int, list[Tensor]] = {}
    with ExitStack() as hooks:
        for layer in attention_layers(model):

            def hook(module: nn.Module, args: tuple, layer: Any = layer) -> None:
                kept.setdefault(layer.number, []).append(args[0][0].unflatten(-1, (head_count(layer), -1)))

            hooks.callback(layer.projection.register_forward_pre_hook(hook).remove)
        for prompt in PROMPTS:
            run(model, prompt)
    return {number: torch.cat(parts) for number, parts in kept.items()}


def run(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def assert_close(actual: Tensor, expected: Tensor, intact: Tensor) -> None:
    bound = ROUNDING * expected.abs().max()
    assert (actual - expected).abs().max() <= bound
    assert (expected - intact).abs().max() > 100 * bound


# --- the sweep


KNOWN = [*FAMILIES, *further_families.known(further_families.EXACT)]


@pytest.mark.parametrize("family", KNOWN)
def test_every_mode_is_what_changing_attention_by_hand_gives(family: str) -> None:
    model, ids = of_any_kind(family), tokens(1, LENGTH)
    heads, intact = some_heads(model), run(model, ids)
    calibration = head_outputs(model)

    def ablated(mode: str, heads: list[tuple[int, int]] = heads) -> Tensor:
        with ablate(model, heads, mode=mode, calibration=PROMPTS, needle=NEEDLE):
            return run(model, ids)

    with projections_given(model, heads, lambda _, x: torch.zeros_like(x)):
        assert_close(ablated("output-zero"), run(model, ids), intact)
    with projections_given(model, heads, lambda layer, x: calibration[layer].mean(0).expand_as(x)):
        assert_close(ablated("output-mean"), run(model, ids), intact)
    with attention_changed(without_needle(heads)):
        expected = run(model, ids)
    assert_close(ablated("needle-knockout"), expected, intact)
    if family not in BIASED_NORM:
        if family in NORMED_TOGETHER:  # with no other head in the layer to be rescaled
            layers = attention_layers(model)
            heads = [(layer.number, head) for layer in layers for head in range(head_count(layer))]
        with attention_changed(without_queries(heads)):
            expected = run(model, ids)
        assert_close(ablated("query-zero", heads), expected, intact)
    assert torch.equal(run(model, ids), intact)


@pytest.mark.parametrize("family", KNOWN)
def test_calibrated_modes_do_something_everywhere_and_leave_nothing(family: str) -> None:
    model, ids = of_any_kind(family), tokens(1, LENGTH)
    intact, seen = run(model, ids), []
    for mode in ("output-resample", "query-mean"):
        with ablate(model, some_heads(model), mode=mode, calibration=PROMPTS):
            seen.append(run(model, ids))
        assert torch.equal(run(model, ids), intact)
    assert all(bool(x.isfinite().all()) and not torch.equal(x, intact) for x in seen)


@pytest.mark.parametrize("family", sorted(further_families.known(further_families.REFUSED)))
def test_what_cannot_be_recorded_works_or_is_refused_in_one_sentence(family: str) -> None:
    model, ids = further_families.build(family), tokens(1, LENGTH)
    intact = run(model, ids)
    for mode in MODES:
        try:
            with ablate(model, some_heads(model), mode=mode, calibration=PROMPTS, needle=NEEDLE):
                assert not torch.equal(run(model, ids), intact)
        except UnsupportedModelError as error:
            assert "\n" not in str(error)
        assert torch.equal(run(model, ids), intact)
