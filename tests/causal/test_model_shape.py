"""The shape of a model: which heads there are, which share a KV group, and what is no set of its heads."""

import pytest

from locos_fast.causal.model_shape import ModelShape, check_heads, model_shape
from locos_fast.models.weightless import weightless
from tests.oracles.architecture_models import FAMILIES, build

SHAPE = ModelShape(layers=4, heads={0: 6, 2: 4, 3: 4}, kv_heads={0: 2, 2: 4, 3: 1})


@pytest.mark.parametrize(
    "family, layers, heads, kv_heads",
    [
        ("llama", 3, {0: 4, 1: 4, 2: 4}, {0: 2, 1: 2, 2: 2}),
        ("gpt2", 3, {0: 4, 1: 4, 2: 4}, {0: 4, 1: 4, 2: 4}),
        ("qwen3_next", 3, {0: 4, 2: 4}, {0: 2, 2: 2}),
        ("gemma4_moe", 3, {0: 4, 1: 4, 2: 4}, {0: 1, 1: 2, 2: 1}),
        ("gemma3_vision", 3, {0: 4, 1: 4, 2: 4}, {0: 2, 1: 2, 2: 2}),
    ],
)
def test_the_shape_of_a_model_is_read_from_its_layers(family, layers, heads, kv_heads):
    assert model_shape(build(family)) == ModelShape(layers, heads, kv_heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_same_shape(family):
    model = build(family)
    bare = weightless(model.config)
    assert model_shape(bare) == model_shape(model)
    assert sum(p.untyped_storage().nbytes() for p in bare.parameters()) < 10_000


def test_heads_of_a_kv_group_stand_side_by_side():
    assert [SHAPE.kv_group((0, head)) for head in range(6)] == [(0, 0)] * 3 + [(0, 1)] * 3
    assert [SHAPE.kv_group((2, head)) for head in range(4)] == [(2, head) for head in range(4)]
    assert {SHAPE.kv_group((3, head)) for head in range(4)} == {(3, 0)}
    assert SHAPE.score_shape == (4, 6)
    assert len(SHAPE.every_head()) == 14 and SHAPE.every_head()[6:8] == [(2, 0), (2, 1)]


def test_heads_of_the_model_pass_in_their_order():
    assert check_heads(SHAPE, iter([(3, 1), (0, 5)])) == [(3, 1), (0, 5)]


@pytest.mark.parametrize(
    "heads, message",
    [
        ([], "expected at least one head, got none"),
        ([(4, 0)], r"no softmax-attention head 4-0; it has 4 layers of 4 or 6 heads"),
        ([(-1, 0)], "no softmax-attention head -1-0"),
        ([(0, 6)], "no softmax-attention head 0-6"),
        ([(2, 4)], "no softmax-attention head 2-4"),  # layer 0 has a head of that number
        ([(0, -1)], "no softmax-attention head 0--1"),
        ([(1, 0)], "1-0: layer 1 of the model has no softmax attention"),
        ([(0, 1), (2, 0), (0, 1)], "0-1 is named twice"),
        ([(0, 1.0)], r"expected \(layer, head\), two whole numbers, got \(0, 1.0\)"),
        ([(0, True)], "two whole numbers"),
        (["0-1"], "two whole numbers, got '0-1'"),
    ],
)
def test_what_is_no_set_of_the_models_heads_is_refused(heads, message):
    with pytest.raises(ValueError, match=f"heads: .*{message}"):
        check_heads(SHAPE, heads)
