"""Calibration is of the intact model, each token counting once, measured once; and it knows what it was measured on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.causal import calibration as module
from locos_fast.causal.ablation import MODES, CalibratedMeans, ablate
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.scoring.recording import record
from tests.oracles import listening
from tests.oracles.tiny_models import build, tokens

PROMPTS = [tokens(1, 19, seed=1), tokens(1, 8, seed=2), tokens(1, 31, seed=3)]
TOKENS = 58
CHOSEN = [(0, 1), (2, 3)]
CALIBRATED = ("output-mean", "output-resample", "query-mean")

pytestmark = pytest.mark.usefixtures("no_gradients")


def given_to_projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """Layer -> (tokens of all prompts, heads * Dv)."""
    parts: dict[int, list[Tensor]] = {}
    for prompt in PROMPTS:
        with listening.projection_inputs(model) as inputs:
            model(prompt, use_cache=False)
        for layer, x in inputs.items():
            parts.setdefault(layer, []).append(x[0])
    return {layer: torch.cat(x) for layer, x in parts.items()}


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward pass."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


# --- what is measured


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_are_over_tokens_not_over_prompts(dtype: torch.dtype) -> None:
    model = build("qwen2", "sdpa", dtype=dtype)  # whose queries have a bias
    means = CalibratedMeans.of(model, PROMPTS)
    queries: list[Tensor] = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *call: queries.append(call[2][0]))
    outputs = given_to_projections(model)
    hook.remove()
    for layer, x in outputs.items():
        assert means.outputs[layer].dtype == torch.float64
        torch.testing.assert_close(means.outputs[layer], x.double().mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(means.queries[1], torch.cat(queries).double().mean(0), rtol=1e-9, atol=1e-9)


def test_lists_and_tensors_are_prompts_alike() -> None:
    model = build("llama", "sdpa")
    means = CalibratedMeans.of(model, PROMPTS)
    lists = CalibratedMeans.of(model, [PROMPTS[0][0].tolist(), PROMPTS[1][0], tuple(PROMPTS[2][0].tolist())])
    assert all(torch.equal(means.outputs[layer], lists.outputs[layer]) for layer in range(3))
    assert means.prompts == lists.prompts


@pytest.mark.parametrize("around", MODES)
def test_it_is_of_the_intact_model_whatever_is_ablated_around_it(around: str) -> None:
    model = build("gemma3", "sdpa")
    means = CalibratedMeans.of(model, PROMPTS)
    with (
        ablate(model, [[(0, 0)], [(1, 1)]], mode=around, calibration=PROMPTS, needle=(2, 5)),
        record(model, [40], [(2, 5)]),
    ):
        inside = CalibratedMeans.of(model, PROMPTS)
        model(tokens(2, 41))  # the recording gets its row
    for layer in range(3):
        assert torch.equal(inside.outputs[layer], means.outputs[layer])
        assert torch.equal(inside.queries[layer], means.queries[layer])
        assert torch.equal(inside.donors.outputs[layer], means.donors.outputs[layer])


@pytest.mark.parametrize("mode", CALIBRATED)
def test_a_sweep_measures_once_and_gets_what_measuring_each_time_gives(mode: str) -> None:
    model, ids = build("llama", "sdpa"), tokens(1, 27)
    means = CalibratedMeans.of(model, PROMPTS)
    with passes(model) as seen:
        for heads in ([(0, 1)], CHOSEN, [(1, 2)]):
            with ablate(model, heads, mode=mode, calibration=means):
                once = model(ids).logits
            assert seen.pop() == 27
            assert not seen
            with ablate(model, heads, mode=mode, calibration=PROMPTS):
                assert torch.equal(model(ids).logits, once)
            assert seen[-4:] == [19, 8, 31, 27]
            seen.clear()


# --- tokens to resample from


def test_few_tokens_are_all_donors_and_of_many_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "sdpa")
    given = given_to_projections(model)
    donors = CalibratedMeans.of(model, PROMPTS).donors
    assert all(torch.equal(donors.outputs[layer], given[layer]) for layer in given)
    monkeypatch.setattr(module, "DONORS", 20)
    few = CalibratedMeans.of(model, PROMPTS).donors.outputs
    places = [
        [int((given[layer] == row).all(-1).nonzero()[0, 0]) for row in few[layer]] for layer in given
    ]  # the same tokens in every layer
    assert places[0] == places[1] == places[2] == sorted(set(places[0]))
    assert len(places[0]) == 20
    assert {0 <= place < 19 for place in places[0]} == {True, False}


def test_a_slot_has_the_same_donor_in_every_forward_pass() -> None:
    donors = module.Donors({0: torch.empty(TOKENS, 1)})
    whole = donors.drawn(range(5000), 0)
    assert torch.equal(donors.drawn(range(1000, 2100), 0), whole[1000:2100])
    assert torch.equal(torch.cat([donors.drawn(range(i, i + 1), 0) for i in (0, 1023, 1024)]), whole[[0, 1023, 1024]])
    assert not torch.equal(donors.drawn(range(5000), 1), whole)
    counts = Counter(whole.tolist())
    assert set(counts) == set(range(TOKENS))
    expected = 5000 / TOKENS
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 110  # chi-squared, 57 degrees: p 3e-5


# --- prompts that are evaluated


def test_evaluating_a_calibration_prompt_is_said_once() -> None:
    model = build("llama", "sdpa")
    for ids in (PROMPTS[1], torch.cat([PROMPTS[1], tokens(1, 3)], 1), torch.cat([tokens(1, 8), PROMPTS[1]])):
        with ablate(model, CHOSEN, mode="output-mean", calibration=PROMPTS):
            with pytest.warns(UserWarning, match=r"calibration: a prompt that is evaluated .* may_overlap=True"):
                model(ids)
            with warnings.catch_warnings(action="error"):
                model(ids)


def test_other_prompts_and_allowed_ones_are_silent() -> None:
    model = build("llama", "sdpa")
    allowed = CalibratedMeans.of(model, PROMPTS, may_overlap=True)
    with warnings.catch_warnings(action="error"):
        with ablate(model, CHOSEN, mode="query-mean", calibration=allowed):
            model(PROMPTS[0])
        with ablate(model, CHOSEN, mode="query-mean", calibration=PROMPTS):
            model(tokens(2, 31))
            model(PROMPTS[2][:, :30])
            model(inputs_embeds=model.get_input_embeddings()(PROMPTS[2]))


# --- bad input


@pytest.mark.parametrize("mode", CALIBRATED)
@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "calibration: expected prompts or CalibratedMeans for mode '.*', got None"),
        ([], "calibration: expected at least one prompt, got none"),
        ("text", r"calibration: expected a sequence of \(1, N\) token ids, got 'text'"),
        (["text"], r"calibration: expected a sequence of \(1, N\) token ids, got 'text' in it"),
        ([[]], r"calibration: expected .*, got one of shape \(1, 0\)"),
        ([tokens(2, 5)], r"calibration: expected .*, got one of shape \(2, 5\) and torch.int64"),
        ([torch.ones(1, 5)], r"calibration: expected .*, got one of shape \(1, 5\) and torch.float32"),
        ([[1, 2, 61]], r"calibration: expected token ids of the model's vocabulary, 0..60, got 61"),
        (3, r"calibration: expected a sequence of \(1, N\) token ids, got 3"),
    ],
)
def test_bad_prompts_are_named(mode: str, given: Any, match: str) -> None:
    model = build("llama", "sdpa")
    with pytest.raises(ValueError, match=match), ablate(model, CHOSEN, mode=mode, calibration=given):
        pass


def test_means_of_another_model_are_refused() -> None:
    means = CalibratedMeans.of(build("llama", "sdpa"), PROMPTS)
    with (
        pytest.raises(ValueError, match="calibration: expected means of this model, got those of another"),
        ablate(build("llama", "sdpa"), CHOSEN, mode="output-mean", calibration=means),
    ):
        pass


def test_where_queries_cannot_be_told_apart_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "sdpa")

    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("layer 0: mixed")

    monkeypatch.setattr(module, "query_projections", refuse)
    means = CalibratedMeans.of(model, PROMPTS)
    assert set(means.outputs) == {0, 1, 2}
    with ablate(model, CHOSEN, mode="output-mean", calibration=means):
        model(tokens(1, 9))
    for given in (means, PROMPTS):
        with (
            pytest.raises(UnsupportedModelError, match="layer 0: mixed"),
            ablate(model, CHOSEN, mode="query-mean", calibration=given),
        ):
            pass
