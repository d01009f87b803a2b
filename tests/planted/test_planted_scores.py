"""The paper's claim on the planted model: LOCOS finds the heads that retrieve, the older detectors also their
decoys."""

from __future__ import annotations

import pytest
import torch

from locos_fast import LocosScorer, ablate, layer_matched
from locos_fast.demo.known_heads import next_token
from locos_fast.planted.model import KINDS, build


@pytest.fixture(scope="module")
def planted():
    return build()


def scores_of(planted, kind: str, length: int):
    trial = planted.trial(length, kind, depth=30, seed=5)
    return LocosScorer(planted.model, planted.tokenizer).score(trial)


def check_locos(planted, kind: str, length: int) -> None:
    scores = scores_of(planted, kind, length)
    assert set(scores.found()) == set(planted.heads[kind])
    weakest = min(scores.score[head] for head in planted.heads[kind])
    for decoy in (*planted.heads["read_only"], *planted.heads["write_only"]):
        assert abs(scores.score[decoy]) < 0.01 * weakest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [500, 1001])
def test_locos_finds_exactly_the_planted_heads(planted, kind, length):
    check_locos(planted, kind, length)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_locos_finds_exactly_the_planted_heads_at_16384_tokens(planted, kind):
    check_locos(planted, kind, 16_384)


@pytest.mark.parametrize("kind", KINDS)
def test_dla_is_fooled_by_heads_that_write_without_reading(planted, kind):
    found = scores_of(planted, kind, 300).found(by="dla")
    assert set(found) == {*planted.heads[kind], *planted.heads["write_only"]}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_spatial_is_fooled_by_heads_that_read_without_writing(planted, kind):
    found = scores_of(planted, kind, 300).found(by="attention_spatial")
    assert set(found) == {*planted.heads[kind], *planted.heads["read_only"]}


def test_the_copy_score_sees_only_literal_retrieval(planted):
    assert set(planted.heads["literal"]) <= set(scores_of(planted, "literal", 300).found(by="wu"))
    assert (scores_of(planted, "non_literal", 300).wu == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_found_heads_are_causal_and_random_ones_of_their_layers_are_not(planted, kind):
    trial = planted.trial(200, kind, depth=50, seed=1)
    found = scores_of(planted, kind, 200).found()
    assert next_token(planted, trial) == trial.answer_ids[0]
    with ablate(planted.model, found):
        assert next_token(planted, trial) != trial.answer_ids[0]
    with ablate(planted.model, layer_matched(planted.model, planted.heads[kind], seed=3).heads):
        assert next_token(planted, trial) == trial.answer_ids[0]


def test_upstream_heads_are_necessary_but_not_found(planted):
    trial = planted.trial(200, "literal", depth=50, seed=1)
    positional = planted.heads["positional"]
    assert not set(positional) & set(scores_of(planted, "literal", 200).found())
    with ablate(planted.model, positional):
        assert next_token(planted, trial) != trial.answer_ids[0]


def test_ablation_silences_only_the_heads_named_and_only_inside_the_context(planted):
    layer, head = planted.heads["literal"][0]
    ids = planted.trial(64, "literal", depth=50, seed=2).input_ids
    projection = planted.model.model.layers[layer].self_attn.o_proj
    seen = []
    with torch.inference_mode():
        before = planted.model(ids).logits
        with ablate(planted.model, [(layer, head)]):
            hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            planted.model(ids)
            hook.remove()
        after = planted.model(ids).logits
    by_head = seen[0].unflatten(-1, (planted.model.config.num_attention_heads, -1))
    assert not by_head[..., head, :].any()
    assert all(by_head[..., other, :].any() for other in range(by_head.shape[-2]) if other != head)
    assert torch.equal(before, after)


def test_ablation_names_what_is_wrong(planted):
    with (
        pytest.raises(ValueError, match=r"heads: the model has no softmax-attention head \(8, 0\)"),
        ablate(planted.model, [(8, 0)]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="mode: expected one of output-zero"),
        ablate(planted.model, [(0, 0)], mode="zero"),
    ):
        pass


def test_controls_match_layers_and_avoid_the_heads_they_control_for(planted):
    heads = [*planted.heads["literal"], *planted.heads["non_literal"], (2, 0)]
    for seed in range(20):
        control = layer_matched(planted.model, heads, seed=seed).heads
        assert sorted(layer for layer, _ in control) == sorted(layer for layer, _ in heads)
        assert not set(control) & set(heads)
        assert len(set(control)) == len(control)
