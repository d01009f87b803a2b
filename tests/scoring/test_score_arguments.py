"""What does and does not matter to score_tokens: the order of its arguments, the tokens after the answer, bad input."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from locos_fast.scoring.head_scores import ARRAYS
from locos_fast.scoring.score import score_tokens
from tests.oracles import architecture_models
from tests.oracles.score_cases import ANSWER, LENGTH, assert_close, described
from tests.oracles.tiny_models import FAMILIES, UNCOMPILED_FLEX, build, tokens

pytestmark = UNCOMPILED_FLEX

# --- the needle and the answer


@pytest.mark.parametrize("spans", [[(4, 6), (6, 9)], [(5, 9), (4, 7)], [(4, 9), (5, 6)], [(8, 9), (4, 8)]])
def test_spans_that_touch_or_overlap_are_their_union(spans: list[tuple[int, int]]) -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    scores, union = score_tokens(model, ids, spans, ANSWER), score_tokens(model, ids, (4, 9), ANSWER)
    assert described(scores) == described(union)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(scores, name), getattr(union, name))


def test_the_order_of_the_answer_positions_does_not_matter() -> None:
    model, ids = build("llama", dtype=torch.float64), tokens(1, LENGTH)
    scores, turned = (score_tokens(model, ids, (4, 9), answer) for answer in (ANSWER, ANSWER[::-1]))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(turned, name), getattr(scores, name))
    assert described(turned) == described(scores)  # positions are kept in increasing order


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_after_the_last_answer_row_do_not_matter(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    more = torch.cat([ids[:, : max(ANSWER) + 1], tokens(1, 9, seed=1)], dim=1)
    scores, longer = score_tokens(model, ids, (4, 9), ANSWER), score_tokens(model, more, (4, 9), ANSWER)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(longer, name), getattr(scores, name))


# --- one lean forward pass


def test_logits_are_computed_for_the_answer_rows_only() -> None:
    model, shapes = build("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    scores = score_tokens(model, tokens(1, LENGTH), (4, 9), ANSWER)
    assert shapes == [(1, 1, 32), (1, len(ANSWER), 32)]  # the first shows, once, what becomes of the heads
    with torch.no_grad():
        logits = model(tokens(1, LENGTH)).logits[0]
    assert scores.meta["predicted_ids"] == [int(logits[position - 1].argmax()) for position in ANSWER]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_cache_is_made(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = build(family)

    def refuse(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a key-value cache was made")

    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    with pytest.raises(AssertionError, match="cache was made"), torch.no_grad():
        model(tokens(1, LENGTH))
    score_tokens(model, tokens(1, LENGTH), (4, 9), ANSWER)


def test_the_model_keeps_no_gradients() -> None:
    model = build("llama")
    score_tokens(model, tokens(1, LENGTH), (4, 9), ANSWER)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- arguments

GOOD = {"input_ids": tokens(1, LENGTH), "needle_span": (4, 9), "answer_positions": ANSWER}
BAD = [
    ("input_ids", tokens(LENGTH)),
    ("input_ids", tokens(2, LENGTH)),
    ("input_ids", tokens(1, LENGTH).int()),
    ("input_ids", tokens(1, LENGTH).float()),
    ("needle_span", (-1, 3)),
    ("needle_span", (9, 4)),
    ("needle_span", (4, 4)),
    ("needle_span", (20, LENGTH + 1)),  # beyond the tokens
    ("needle_span", (20, 23)),  # covers the first answer token
    ("needle_span", [(4, 9), (23, 26)]),
    ("needle_span", (26, 27)),  # after the answer, where no row sees it
    ("needle_span", []),
    ("needle_span", 4),
    ("needle_span", None),
    ("needle_span", (4, 9, 11)),
    ("needle_span", (4.0, 9.0)),
    ("answer_positions", []),
    ("answer_positions", [0]),
    ("answer_positions", [LENGTH]),
    ("answer_positions", [-1]),
    ("answer_positions", [22, 22]),
    ("answer_positions", [22.5]),
    ("norm", "final"),
    ("backend", "cuda"),
]


@pytest.mark.parametrize("argument, value", BAD)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        score_tokens(model, **{**GOOD, argument: value})


def test_numpy_positions_are_as_good_as_ints() -> None:
    scores = score_tokens(build("llama"), tokens(1, LENGTH), (np.int64(4), np.int64(9)), np.array(ANSWER))
    json.dumps(scores.meta)


def test_the_order_does_not_matter_when_every_fed_token_is_an_answer_row():
    """Three tokens are fed and all three rows are answer rows: nothing but their order could tell them apart."""
    model, ids = build("llama"), tokens(1, 6)
    forward = score_tokens(model, ids, (0, 1), [1, 2, 3], contrast=[7, 8, 9])
    backward = score_tokens(model, ids, (0, 1), [3, 2, 1], contrast=[9, 8, 7])
    assert np.array_equal(forward.score, backward.score, equal_nan=True)
    assert np.array_equal(forward.dla, backward.dla)


@pytest.mark.parametrize("family", ["llama", "gemma4"])  # Gemma-4 then skips early queries in its shared-KV layers
def test_a_model_spread_over_devices_is_asked_for_its_last_logits(family: str) -> None:
    """An index tensor would have to be on the last layer's device; the number of last tokens works everywhere."""
    model, ids = architecture_models.build(family), tokens(1, 20)
    expected = score_tokens(model, ids, (2, 5), [12, 15, 19], norm="frozen")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    spread = score_tokens(model, ids, (2, 5), [12, 15, 19], norm="frozen")
    for name in ARRAYS:
        # float32: the same sums from products of other shapes
        assert_close(getattr(spread, name), getattr(expected, name), 1e-5)
