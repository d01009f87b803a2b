"""What `ablate` is given is checked before anything is changed, and the message says what was wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from locos_fast.causal.ablation import MODES, ablate
from tests.oracles import architecture_models
from tests.oracles.tiny_models import build, tokens

NOT_A_PAIR = r"heads: expected \(layer, head\) pairs of whole numbers, got "


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ([], r"heads: expected at least one \(layer, head\), got none"),
        ([[], []], r"heads: expected at least one \(layer, head\), got none"),
        ([(3, 0)], r"heads: the model has no softmax-attention head \(3, 0\)"),
        ([(0, 4)], r"heads: the model has no softmax-attention head \(0, 4\)"),
        ([(0, 1), (-1, 0)], r"heads: the model has no softmax-attention head \(-1, 0\)"),
        ([[(0, 1)], [(0, 9)]], r"heads: the model has no softmax-attention head \(0, 9\)"),
        ([(0, 1, 2)], NOT_A_PAIR + r"\(0, 1, 2\)"),
        ([(0, 1.5)], NOT_A_PAIR + r"\(0, 1.5\)"),
        (["0-1"], NOT_A_PAIR + "'0-1'"),
        ([3], NOT_A_PAIR + "3"),
    ],
)
def test_heads(mode: str, heads: Any, match: str) -> None:
    model = build("llama", "sdpa")
    with pytest.raises(ValueError, match=match), ablate(model, heads, mode=mode, calibration=[[1]], needle=(0, 1)):
        pass


def test_layers_without_attention_have_no_heads() -> None:
    model = architecture_models.build("qwen3_next")
    with pytest.raises(ValueError, match=r"no softmax-attention head \(1, 0\)"), ablate(model, [(1, 0)]):
        pass


def test_an_unknown_mode_is_named_among_those_there_are() -> None:
    with (
        pytest.raises(ValueError, match=f"mode: expected one of {', '.join(MODES)}, got 'zero'"),
        ablate(build("llama"), [(0, 0)], mode="zero"),
    ):
        pass


@pytest.mark.parametrize(
    ("needle", "match"),
    [
        (None, r"needle: expected \(start, end\) in slots for mode 'needle-knockout', got None"),
        ((5, 5), r"needle: expected 0 <= start < end, got \(5, 5\)"),
        ((-1, 5), r"needle: expected 0 <= start < end, got \(-1, 5\)"),
        ([], "needle: expected "),
        (7, "needle: expected pairs of ints, got 7"),
        ((1, 2, 3), r"needle: expected pairs of ints, got \(1, 2, 3\)"),
        (torch.tensor([1.0, 2.0]), "needle: expected pairs, or an int"),
    ],
)
def test_needles(needle: Any, match: str) -> None:
    with (
        pytest.raises(ValueError, match=match),
        ablate(build("llama"), [(0, 0)], mode="needle-knockout", needle=needle),
    ):
        pass


def test_a_needle_for_each_row_needs_as_many_rows() -> None:
    model, needles = build("llama", "sdpa"), torch.tensor([[[1, 2]], [[3, 4]]])
    with (
        ablate(model, [(0, 0)], mode="needle-knockout", needle=needles),
        pytest.raises(ValueError, match="needle: expected one entry for each of the 3 rows of the batch, got 2"),
    ):
        model(tokens(3, 9))


@pytest.mark.usefixtures("no_gradients")
def test_heads_come_in_any_collection() -> None:
    model, ids = build("llama", "sdpa"), tokens(1, 9)
    logits = []
    for heads in (
        [(0, 1), (2, 3)],
        {(2, 3), (0, 1)},
        ([0, 1], [2, 3]),
        np.array([[0, 1], [2, 3]]),
        iter([(0, 1), (2, 3)]),
    ):
        with ablate(model, heads):
            logits.append(model(ids).logits)
    assert all(torch.equal(x, logits[0]) for x in logits)
