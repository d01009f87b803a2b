"""Attention functions are called in many ways; query, key, value and mask are found in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from locos_fast.models.architecture import attention_layers
from locos_fast.models.attention_registry import interface_call
from locos_fast.scoring.attribute_tokens import attribute_tokens
from locos_fast.scoring.score import score_tokens
from tests.oracles.tiny_models import build, tokens

NEEDLE, ANSWER, LENGTH = (4, 9), [18, 20], 21
QKV_MASK = ("query", "key", "value", "mask")


def usual(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float = 1.0, **kwargs: Any):
    return None


def other_names(module: Any, q: Any, k: Any, v: Any, m: Any = None, **kwargs: Any):
    return None


def open_ended(module: Any, *args: Any, **kwargs: Any):
    return None


def half_open(module: Any, query: Any, *args: Any, **kwargs: Any):
    return None


@pytest.mark.parametrize(
    "implementation, args, kwargs",
    [
        (usual, QKV_MASK, {"scaling": 0.5}),
        (usual, (*QKV_MASK, 0.5), {}),
        (usual, QKV_MASK[:3], {"attention_mask": "mask", "scaling": 0.5}),
        (usual, (), {"scaling": 0.5, "attention_mask": "mask", "value": "value", "key": "key", "query": "query"}),
        (other_names, QKV_MASK[:3], {"m": "mask", "scaling": 0.5}),
        (other_names, (), {"m": "mask", "v": "value", "k": "key", "q": "query", "scaling": 0.5}),
        (open_ended, QKV_MASK, {"scaling": 0.5}),
        (open_ended, QKV_MASK[:3], {"attention_mask": "mask", "scaling": 0.5}),
        (half_open, QKV_MASK, {"scaling": 0.5}),
        (half_open, QKV_MASK[:2], {"value": "value", "attention_mask": "mask", "scaling": 0.5}),
    ],
)
def test_arguments_are_found_by_position_or_by_keyword(implementation: Callable, args: tuple, kwargs: dict) -> None:
    call = interface_call(implementation, args, kwargs)
    assert call.qkv == QKV_MASK[:3]
    assert call.mask == "mask"
    assert call.others == {"scaling": 0.5}


def test_a_call_without_a_mask_has_none() -> None:
    call = interface_call(usual, ("query", "key", "value"), {})
    assert call.mask is None
    assert call.others == {}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_do_not_depend_on_how_the_function_is_called(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    model, ids = build("gemma3", attention), tokens(1, LENGTH)
    scores = score_tokens(model, ids, NEEDLE, ANSWER, norm="frozen", verify=True)
    sums = attribute_tokens(model, ids, ANSWER, [NEEDLE])

    get = AttentionInterface.get_interface
    called = []

    def by_keyword(self: Any, *asked: Any, **named: Any) -> Callable:
        function = get(self, *asked, **named)

        def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
            called.append(module)
            return function(module, query=query, value=value, key=key, attention_mask=mask, **kwargs)

        return call

    monkeypatch.setattr(AttentionInterface, "get_interface", by_keyword)
    again = score_tokens(model, ids, NEEDLE, ANSWER, norm="frozen", verify=True)
    assert {id(module) for module in called} == {id(layer.module) for layer in attention_layers(model)}
    torch.testing.assert_close(torch.tensor(again.score), torch.tensor(scores.score), rtol=0, atol=0, equal_nan=True)
    assert (attribute_tokens(model, ids, ANSWER, [NEEDLE]) == sums).all()
