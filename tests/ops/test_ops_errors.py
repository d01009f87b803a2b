"""Arguments that do not fit: a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from locos_fast import ops
from locos_fast.ops import backends
from locos_fast.ops.visibility import count_keys
from tests.oracles.attention_problem import Problem, random_problem, random_weights_problem

BATCH, HEADS, KV_HEADS, ROWS, KEYS, HEAD_DIM, VALUE_DIM = 2, 6, 2, 4, 21, 16, 24
FUNCTIONS = ("contributions", "summary", "positions")

BAD_SPANS = {
    "none": [],
    "empty tensor": torch.zeros(BATCH, 0, 2, dtype=torch.int64),
    "start = end": [(0, 3), (5, 5)],
    "start > end": [(5, 3)],
    "negative start": [(-1, 3)],
    "negative start in a tensor": torch.tensor([[[0, 3]], [[-2, 3]]]),
    "triples": [(0, 3, 5)],
    "floats": [(0.0, 3.0)],
    "float tensor": torch.tensor([[[0.0, 3.0]]] * BATCH),
    "a tensor without a batch": torch.tensor([[0, 3]]),
    "a tensor of another batch": torch.tensor([[[0, 3]]] * (BATCH + 1)),
    "a tensor of triples": torch.tensor([[[0, 3, 5]]] * BATCH),
}


def problem(**changes: Any) -> Problem:
    return random_problem(
        batch=BATCH, kv_heads=KV_HEADS, group=3, head_dim=HEAD_DIM, value_dim=VALUE_DIM, rows=ROWS, keys=KEYS
    )._replace(**changes)


def assert_refused(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected .+, got .+"):
        call()


def bad_arguments() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is wrong: (argument that the message names, changes to a good problem)."""
    good = problem()
    query, key, value = good[:3]
    seen = good.visibility
    return {
        "query of three dimensions": ("query", {"query": query[0]}),
        "integer query": ("query", {"query": query.int()}),
        "complex query": ("query", {"query": query.to(torch.complex64)}),
        "key of three dimensions": ("key", {"key": key[0]}),
        "key of another batch": ("key", {"key": key[:1]}),
        "key of another head_dim": ("key", {"key": key[..., :-1]}),
        "key of another dtype": ("key", {"key": key.half()}),
        "key on another device": ("key", {"key": key.to("meta")}),
        "key heads that do not divide": ("key", {"key": key.repeat(1, 2, 1, 1), "value": value.repeat(1, 2, 1, 1)}),
        "no key heads": ("key", {"key": key[:, :0], "value": value[:, :0]}),
        "value of another batch": ("value", {"value": value[:1]}),
        "value of other heads": ("value", {"value": value[:, :1]}),
        "value of other keys": ("value", {"value": value[:, :, 1:]}),
        "value of another dtype": ("value", {"value": value.bfloat16()}),
        "value on another device": ("value", {"value": value.to("meta")}),
        "first of other rows": ("visibility.first", {"visibility": seen._replace(first=seen.first[1:])}),
        "last of another batch": ("visibility.last", {"visibility": seen._replace(last=seen.last.expand(3, ROWS))}),
        "float first": ("visibility.first", {"visibility": seen._replace(first=seen.first.float())}),
        "int32 last": ("visibility.last", {"visibility": seen._replace(last=seen.last.int())}),
        "key_mask of rows": (
            "visibility.key_mask",
            {"visibility": seen._replace(key_mask=torch.ones(BATCH, ROWS, dtype=torch.bool))},
        ),
        "integer key_mask": (
            "visibility.key_mask",
            {"visibility": seen._replace(key_mask=torch.ones(BATCH, KEYS, dtype=torch.int64))},
        ),
        "softcap 0": ("softcap", {"softcap": 0.0}),
        "negative softcap": ("softcap", {"softcap": -30.0}),
        "sinks per key head": ("sinks", {"sinks": torch.zeros(KV_HEADS)}),
        "sinks on another device": ("sinks", {"sinks": torch.zeros(HEADS, device="meta")}),
    }


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wrong", bad_arguments())
def test_attention_functions_refuse(wrong, function):
    argument, changes = bad_arguments()[wrong]
    assert_refused(lambda: getattr(problem(**changes), function)("torch"), argument)


@pytest.mark.parametrize("function", ["contributions", "positions"])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[..., :HEAD_DIM],
        lambda w: w[:, :KV_HEADS],
        lambda w: w[:, :, 0],
        lambda w: w.half(),
        lambda w: w.double(),
        lambda w: w.to("meta"),
    ],
    ids=["of another width", "per key head", "of one row", "half", "double", "on another device"],
)
def test_attention_functions_refuse_a_direction(change, function):
    good = problem()
    assert_refused(lambda: getattr(good._replace(direction=change(good.direction)), function)("torch"), "direction")


@pytest.mark.parametrize("spans", BAD_SPANS.values(), ids=BAD_SPANS)
def test_spans_are_refused(spans):
    weights = random_weights_problem(batch=BATCH, keys=KEYS)._replace(spans=spans)
    for call in (problem(spans=spans).contributions, problem(spans=spans).summary, weights.contributions):
        assert_refused(lambda call=call: call("torch"), "spans")


@pytest.mark.parametrize("backend", ["cuda", "", "Torch", None])
def test_unknown_backends_are_refused(backend):
    for call in (
        problem().contributions,
        problem().summary,
        problem().positions,
        random_weights_problem().contributions,
    ):
        assert_refused(lambda call=call: call(backend), "backend")


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (problem().contributions, problem().summary, random_weights_problem().contributions):
        assert_refused(lambda call=call: call("triton"), "backend")


def test_triton_has_no_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "triton_available", lambda: True)
    double = random_problem(dtype=torch.float64)
    for call in (double.contributions, double.summary, random_weights_problem(dtype=torch.float64).contributions):
        assert_refused(lambda call=call: call("triton"), "backend")


def test_triton_must_be_installed(monkeypatch):
    monkeypatch.setattr(backends, "triton_available", lambda: False)
    assert_refused(lambda: problem().contributions("triton"), "backend")


def test_positions_have_no_triton_backend():
    assert_refused(lambda: problem().positions("triton"), "backend")


def bad_weights_arguments() -> dict[str, tuple[str, dict[str, Any]]]:
    attn, value, direction, _ = random_weights_problem(batch=BATCH, keys=KEYS)
    return {
        "attn of three dimensions": ("attn", {"attn": attn[0]}),
        "boolean attn": ("attn", {"attn": attn > 0}),
        "value of other keys": ("value", {"value": value[:, :, 1:]}),
        "value of another batch": ("value", {"value": value[:1]}),
        "value of another dtype": ("value", {"value": value.half()}),
        "value on another device": ("value", {"value": value.to("meta")}),
        "value heads that do not divide": ("value", {"value": value.repeat(1, 2, 1, 1)}),
        "direction of another width": ("direction", {"direction": direction[..., 1:]}),
        "half direction": ("direction", {"direction": direction.half()}),
        "visible of keys": ("visible", {"visible": torch.zeros(BATCH, KEYS, dtype=torch.int64)}),
        "int32 visible": ("visible", {"visible": torch.zeros(BATCH, ROWS, dtype=torch.int32)}),
        "visible on another device": (
            "visible",
            {"visible": torch.zeros(BATCH, ROWS, dtype=torch.int64, device="meta")},
        ),
    }


@pytest.mark.parametrize("wrong", bad_weights_arguments())
def test_ov_contribution_refuses(wrong):
    argument, changes = bad_weights_arguments()[wrong]
    good = random_weights_problem(batch=BATCH, keys=KEYS)._asdict()
    assert_refused(lambda: ops.ov_contribution(**good | changes, backend="torch"), argument)


def test_the_message_says_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"^value: expected shape \(2, 2, 21, \*\), got \(2, 2, 20, 24\)$"):
        problem(value=problem().value[:, :, 1:]).contributions("auto")


def test_counts_of_other_spans_are_refused():
    problem = random_problem(batch=2, rows=3, keys=20, spans=[(0, 5)])
    counts = count_keys(problem.visibility, torch.tensor([[(0, 5), (5, 9)]]), 1, 20)
    with pytest.raises(ValueError, match=r"counts: expected shapes \(\(2, 3\), \(2, 3, 1\)\), got"):
        ops.attention_summary(
            problem.query, problem.key, problem.value, [(0, 5)], problem.visibility, counts=counts, backend="torch"
        )
