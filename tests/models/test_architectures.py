"""Every family: contributions add up to the model's own logit, and scores are their definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from locos_fast.causal.ablation import ablate
from locos_fast.models.architecture import (
    attention_layers,
    decoder_layers,
    head_count,
    layer_count,
)
from locos_fast.models.memory_estimate import estimate
from locos_fast.scoring.directions import NORMS
from locos_fast.scoring.score import score_tokens
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.definition import ANSWER, LENGTH, SCORES, distance, naive, naive_scores, text_layers
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import WINDOW, tokens, visible_keys

IDENTITY = 1e-6  # transformers' norms and softmax compute in float32, also in a float64 model
DEFINITION = 1e-5  # of the largest magnitude
NEEDLES = {"before": (3, 6), "across": (10, 20), "inside": (17, 20)}
WINDOWED = [
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "llama4",
    "mixtral",
    "gemma3_vision",
    "gemma4",
    "gemma4_moe",
    "olmo3",
    "phi3",
    "cohere2",
    "smollm3",
]

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is not available")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


# --- all families


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_and_scores_are_the_definition(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    truth = naive(model, family, ids)
    scores = {norm: score_tokens(model, ids, NEEDLES["across"], ANSWER, norm=norm, verify=True) for norm in NORMS}
    shape = scores["none"].score.shape
    off = {norm: distance(scores[norm], naive_scores(truth, norm, NEEDLES["across"], shape)) for norm in NORMS}
    completeness = scores["frozen"].meta["completeness"]
    worst_layer = max(completeness["layers"].values())
    print(
        f"\n{family:20s} identity {completeness['overall']:.1e}  worst layer {worst_layer:.1e}  "
        f"from the definition: none {off['none']:.1e}  frozen {off['frozen']:.1e}",
        end="",
    )
    assert set(completeness["layers"]) == {str(number) for number in truth.attended}
    assert completeness["overall"] <= IDENTITY
    assert worst_layer <= IDENTITY
    assert off["none"] <= DEFINITION
    assert off["frozen"] <= DEFINITION


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_scores_are_those_of_eager(family: str) -> None:
    if "sdpa" not in FAMILIES[family].implementations:
        pytest.skip("this family has no sdpa")
    ids = tokens(1, LENGTH)
    eager, sdpa = (
        score_tokens(build(family, attention), ids, NEEDLES["across"], ANSWER, norm="frozen", verify=True)
        for attention in ("eager", "sdpa")
    )
    assert distance(sdpa, {name: getattr(eager, name) for name in SCORES}) <= DEFINITION


# --- windows and chunks


@pytest.mark.parametrize("family", WINDOWED)
def test_the_needle_before_across_and_inside_a_window(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    truth = naive(model, family, ids)
    assert any(
        bool((attended.weights[0, -1, : max(ANSWER) - WINDOW] == 0).all()) for attended in truth.attended.values()
    )
    for place, span in NEEDLES.items():
        scores = score_tokens(model, ids, span, ANSWER, verify=True)
        assert distance(scores, naive_scores(truth, "none", span, scores.score.shape)) <= DEFINITION, place
        for layer in truth.attended:
            rows = visible_keys(model, layer, LENGTH)[[position - 1 for position in ANSWER]]
            blind = not bool(rows[:, span[0] : span[1]].any())
            assert np.isnan(scores.score[layer]).all() == blind
            assert not np.isnan(scores.dla[layer]).any()


def test_every_family_with_a_window_is_among_them() -> None:
    for family in set(FAMILIES) - set(WINDOWED):
        model = build(family)
        for layer in attention_layers(model):
            assert bool(visible_keys(model, layer.number, LENGTH)[-1].all()), family


def test_linear_layers_are_not_scored() -> None:
    scores = score_tokens(build("qwen3_next"), tokens(1, LENGTH), NEEDLES["inside"], ANSWER, norm="frozen")
    for name in (*SCORES, "attention_spatial", "wu"):
        assert np.isnan(getattr(scores, name)).all(-1).tolist() == [False, True, False]


# --- the residual stream in low precision, heads by number, memory


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_in_bfloat16_as_far_as_it_goes(family: str) -> None:
    """A stream of a dozen writes, each rounded once or twice, half an ulp at a time."""
    model = build(family, dtype=torch.bfloat16)
    scores = score_tokens(model, tokens(1, LENGTH), NEEDLES["across"], ANSWER, norm="frozen")
    completeness = scores.meta["completeness"]
    assert max(completeness["overall"], *completeness["layers"].values()) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_has_a_number(family: str) -> None:
    model = build(family)
    layers = attention_layers(model)
    assert layer_count(model) == len(decoder_layers(model)) == len(text_layers(model)[1])
    every_head = [(layer.number, head) for layer in layers for head in range(head_count(layer))]
    scores = score_tokens(model, tokens(1, LENGTH), NEEDLES["inside"], ANSWER)
    assert every_head == [tuple(head) for head in np.argwhere(~np.isnan(scores.dla)).tolist()]
    silent = []
    with ablate(model, every_head), ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hook = layer.projection.register_forward_hook(lambda _, args, output: silent.append(not args[0].any()))
            hooks.callback(hook.remove)
        model(tokens(1, LENGTH))
    assert silent == [True] * len(layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_estimated(family: str, attention: str) -> None:
    model = build(family, dtype=torch.bfloat16)
    needed = estimate(model.config, 100, torch.bfloat16, attention)
    assert needed.weights == sum(parameter.numel() * 2 for parameter in model.parameters())
    assert needed.activations > 0
