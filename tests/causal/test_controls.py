"""Control heads: of the same layers, and of the nearest ones where a layer has no other head left."""

from collections import Counter

import pytest

from locos_fast.causal.controls import nearest_layer_heads
from locos_fast.planted.model import build

LAYERS, HEADS = 5, 4


@pytest.fixture(scope="module")
def model():
    return build(layers=LAYERS, heads=HEADS, kv_heads=4).model


def layers_of(heads):
    return Counter(layer for layer, _ in heads)


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_has_as_many_heads_in_each_layer_and_none_of_the_given_ones(model, seed):
    given = [(1, 0), (1, 3), (4, 2)]
    draw = nearest_layer_heads(model, given, seed=seed)
    assert layers_of(draw.heads) == layers_of(given)
    assert not set(draw.heads) & set(given)
    assert draw.borrowed == 0


def test_draws_differ_by_seed_and_repeat_with_it(model):
    draws = [tuple(nearest_layer_heads(model, [(1, 0), (3, 1)], seed=seed).heads) for seed in range(10)]
    assert len(set(draws)) > 1
    assert draws == [tuple(nearest_layer_heads(model, [(1, 0), (3, 1)], seed=seed).heads) for seed in range(10)]


def test_what_a_layer_lacks_comes_from_the_nearest_layers(model):
    given = [(2, 0), (2, 1), (2, 2)]
    draw = nearest_layer_heads(model, given, seed=0)
    assert layers_of(draw.heads) == {2: 1, 1: 2}
    assert draw.borrowed == 2


def test_a_near_layer_that_is_full_itself_is_passed_over(model):
    given = [(4, head) for head in range(HEADS)] + [(3, head) for head in range(3)]
    draw = nearest_layer_heads(model, given, seed=0)
    assert layers_of(draw.heads) == {3: 1, 2: 4, 1: 2}
    assert not set(draw.heads) & set(given)
    assert len(set(draw.heads)) == len(given)
    assert draw.borrowed == 6


def test_more_than_half_of_all_heads_cannot_be_matched(model):
    given = [(layer, head) for layer in range(3) for head in range(HEADS)]
    with pytest.raises(ValueError, match="8 other heads, too few to match 12"):
        nearest_layer_heads(model, given, seed=0)
