"""Control heads: random ones, of the same layers or the nearest, and of as many KV groups."""

from collections import Counter
from itertools import combinations

import pytest

from locos_fast.causal.controls import NULLS, draws, kv_group_matched, layer_matched, random_heads
from locos_fast.causal.model_shape import ModelShape
from locos_fast.planted.model import build

LAYERS, HEADS = 5, 4
SHAPE = ModelShape.uniform(LAYERS, HEADS, kv_heads=2)
MIXED = ModelShape(4, {0: 4, 1: 4, 3: 6}, {0: 1, 1: 2, 3: 3})  # groups of 4, of 2 and of 2


def layers_of(heads):
    return Counter(layer for layer, _ in heads)


def group_pattern(shape, heads):
    return sorted(Counter(map(shape.kv_group, heads)).values())


def test_a_model_will_do_in_place_of_its_shape():
    model = build(layers=LAYERS, heads=HEADS, kv_heads=2).model
    for control in (random_heads, layer_matched, kv_group_matched):
        assert control(model, [(1, 0), (3, 1)], seed=3) == control(SHAPE, [(1, 0), (3, 1)], seed=3)


@pytest.mark.parametrize("seed", range(5))
def test_random_heads_are_as_many_and_none_of_the_given_ones(seed):
    given = [(1, head) for head in range(HEADS)]
    draw = random_heads(SHAPE, given, seed=seed)
    assert len(set(draw.heads)) == 4 and not set(draw.heads) & set(given)


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_has_as_many_heads_in_each_layer_and_none_of_the_given_ones(seed):
    given = [(1, 0), (1, 3), (4, 2)]
    draw = layer_matched(SHAPE, given, seed=seed)
    assert layers_of(draw.heads) == layers_of(given)
    assert not set(draw.heads) & set(given)
    assert (draw.borrowed, draw.distance) == (0, 0)


def test_what_a_layer_lacks_comes_from_the_nearest_layers():
    draw = layer_matched(SHAPE, [(2, 0), (2, 1), (2, 2)], seed=0)
    assert layers_of(draw.heads) == {2: 1, 1: 2}
    assert (draw.borrowed, draw.distance) == (2, 1)


def test_a_near_layer_that_is_full_itself_is_passed_over():
    given = [(4, head) for head in range(HEADS)] + [(3, head) for head in range(3)]
    draw = layer_matched(SHAPE, given, seed=0)
    assert layers_of(draw.heads) == {3: 1, 2: 4, 1: 2}
    assert not set(draw.heads) & set(given)
    assert len(set(draw.heads)) == len(given)
    assert (draw.borrowed, draw.distance) == (6, 3)  # layer 4 borrows of layer 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [SHAPE, MIXED])
def test_kv_groups_are_others_with_the_same_numbers_of_heads(shape, seed):
    given = [(3, 0), (3, 1), (3, 2)] if shape is MIXED else [(0, 0), (0, 1), (0, 2), (1, 3)]
    draw = kv_group_matched(shape, given, seed=seed)
    assert group_pattern(shape, draw.heads) == group_pattern(shape, given)
    assert not set(map(shape.kv_group, draw.heads)) & set(map(shape.kv_group, given))


def test_groups_are_left_for_those_that_take_most_heads():
    given = [(0, 0), (0, 1), (0, 2), (1, 0)]  # three of one group, which only the other large one can match
    shape = ModelShape(4, {0: 4, 1: 4, 2: 4, 3: 4}, {0: 1, 1: 4, 2: 1, 3: 4})
    for seed in range(20):
        draw = kv_group_matched(shape, given, seed=seed)
        assert layers_of(draw.heads)[2] == 3 and group_pattern(shape, draw.heads) == [1, 3]


def brute_force(kind, shape, given):
    """All sets that a null allows, by its definition; without heads to borrow."""
    heads = [head for head in shape.every_head() if head not in given]
    for found in combinations(heads, len(given)):
        if kind == "layer-matched" and layers_of(found) != layers_of(given):
            continue
        groups = set(map(shape.kv_group, given))
        if kind == "kv-group-matched" and (
            group_pattern(shape, found) != group_pattern(shape, given) or groups & set(map(shape.kv_group, found))
        ):
            continue
        yield found


@pytest.mark.parametrize("kind", NULLS)
@pytest.mark.parametrize(
    "shape, given",
    [
        (SHAPE, [(0, 0), (0, 1), (2, 3)]),
        (SHAPE, [(1, 2)]),
        (MIXED, [(1, 0), (3, 2)]),
        (MIXED, [(1, 0), (1, 1), (3, 5)]),
    ],
)
def test_all_different_draws_are_given_where_more_are_asked_for(kind, shape, given):
    allowed = set(brute_force(kind, shape, given))
    found = draws(kind, shape, given, len(allowed) + 7)
    assert found.possible == len(found.sets) == len(allowed)
    assert set(map(tuple, found.sets)) == allowed


def test_borrowed_heads_count_into_what_is_possible():
    """Layer 2 gives its one other head, layer 1 two of its four."""
    found = draws("layer-matched", SHAPE, [(2, 0), (2, 1), (2, 2)], 100)
    assert found.possible == len(found.sets) == 6
    assert (found.borrowed, found.distance) == (2, 1)


@pytest.mark.parametrize("kind", NULLS)
def test_draws_are_different_repeat_with_the_seed_and_fewer_are_the_first_of_more(kind):
    given = [(1, 0), (1, 1), (2, 3), (3, 2), (4, 0)]
    many = draws(kind, SHAPE, given, 20, seed=5)
    assert len(set(map(tuple, many.sets))) == 20 < many.possible
    assert draws(kind, SHAPE, given, 10, seed=5).sets == many.sets[:10]
    assert draws(kind, SHAPE, given, 10, seed=6).sets != many.sets[:10]
    one = {"random": random_heads, "layer-matched": layer_matched, "kv-group-matched": kv_group_matched}[kind]
    assert one(SHAPE, given, seed=5).heads == many.sets[0]


@pytest.mark.parametrize("kind", NULLS)
def test_every_allowed_set_is_as_likely_as_any_other(kind):
    given = [(0, 1), (1, 2)]
    allowed = set(brute_force(kind, SHAPE, given))
    runs = 20 * len(allowed)
    one = {"random": random_heads, "layer-matched": layer_matched, "kv-group-matched": kv_group_matched}[kind]
    seen = Counter(tuple(one(SHAPE, given, seed=seed).heads) for seed in range(runs))
    chi_square = sum((seen[draw] - 20) ** 2 / 20 for draw in allowed)
    freedom = len(allowed) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations above its mean


@pytest.mark.parametrize(
    "kind, given, message",
    [
        ("random", [(layer, head) for layer in range(3) for head in range(4)], "8 other heads, too few to match 12"),
        ("layer-matched", [(l, head) for l in range(3) for head in range(4)], "8 other heads, too few to match 12"),
        (
            "kv-group-matched",
            [(layer, head) for layer in range(3) for head in (0, 2)],
            "they take 5 KV groups with 1 or more heads in each, and the model has 4 other groups",
        ),
        ("random", [], "heads: expected at least one head"),
        ("layer-matched", [(5, 0)], "no softmax-attention head 5-0"),
        ("nearest", [(0, 0)], "kind: expected one of random, layer-matched, kv-group-matched, got 'nearest'"),
    ],
)
def test_what_has_no_control_is_refused(kind, given, message):
    with pytest.raises(ValueError, match=message):
        draws(kind, SHAPE, given, 5)


def test_a_group_of_which_too_many_heads_are_taken_cannot_be_matched():
    with pytest.raises(ValueError, match="they take 1 KV groups with 3 or more heads in each, and the model has 0"):
        kv_group_matched(MIXED, [(0, 0), (0, 1), (0, 2)], seed=0)


def test_no_draws_is_no_number_of_draws():
    with pytest.raises(ValueError, match="count: expected at least one draw, got 0"):
        draws("random", SHAPE, [(0, 0)], 0)
