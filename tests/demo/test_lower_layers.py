"""Ablations that share what lies below them give what whole forwards give."""

import contextlib
import dataclasses

import pytest
import torch

from locos_fast.causal.ablation import ablate
from locos_fast.demo.lower_layers import answers_without
from locos_fast.models.answer_pass import answer_logits
from locos_fast.models.architecture import decoder_layers
from locos_fast.planted.model import build


@pytest.fixture(scope="module")
def planted():
    return build(layers=6, seed=1)


def head_sets(planted):
    roles = planted.heads
    return [(), *([head] for head in roles["literal"]), roles["literal"], roles["read_only"], roles["positional"]]


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_whole_forwards(planted, seed):
    trial = planted.trial(120, "literal", depth=50, seed=seed)
    rows = [position - 1 for position in trial.answer_positions]
    expected = []
    for heads in head_sets(planted):
        without = ablate(planted.model, heads) if heads else contextlib.nullcontext()
        with torch.inference_mode(), without:
            expected.append(answer_logits(planted.model, trial.input_ids[:, :-1], rows).argmax(-1).tolist())
    right = [answer == trial.answer_ids for answer in expected]
    assert answers_without(planted.model, trial, head_sets(planted)) == right
    assert True in right and False in right  # the sets are told apart


def test_layers_below_the_first_ablated_one_run_once(planted):
    trial = planted.trial(60, "literal", depth=50, seed=0)
    runs = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
        for number, layer in enumerate(decoder_layers(planted.model))
    ]
    answers_without(planted.model, trial, [[(4, 0)], [(5, 0)], [(2, 0), (5, 1)]])
    for hook in hooks:
        hook.remove()
    assert [runs.count(number) for number in range(6)] == [1, 1, 2, 2, 3, 4]


def test_the_model_is_put_back(planted):
    trial = planted.trial(60, "literal", depth=50, seed=0)
    before = planted.model(trial.input_ids).logits
    answers_without(planted.model, trial, [[(3, 0)]])
    assert all("forward" not in vars(layer) for layer in decoder_layers(planted.model))
    assert torch.equal(planted.model(trial.input_ids).logits, before)


def test_a_question_that_the_model_gets_wrong_is_none(planted):
    trial = planted.trial(60, "literal", depth=50, seed=0)
    wrong = dataclasses.replace(trial, answer_ids=[trial.answer_ids[0] + 1])
    assert answers_without(planted.model, wrong, [[(3, 0)]]) is None
