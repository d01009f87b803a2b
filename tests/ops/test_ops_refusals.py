"""Arguments that would give nonsense or a foreign error are refused by name, whatever their type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from locos_fast.ops import Visibility, attention_contribution, attention_summary, ov_contribution

POSITIONS = torch.tensor([4, 5])
QUERY, KEY, VALUE = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
DIRECTION = torch.randn(1, 4, 2, 8)
GOOD: dict[str, Any] = {
    "query": QUERY,
    "key": KEY,
    "value": VALUE,
    "direction": DIRECTION,
    "spans": [(0, 3)],
    "visibility": Visibility.causal(POSITIONS),
}


@pytest.mark.parametrize("argument", ["window", "chunk"])
@pytest.mark.parametrize("slots", [0, -2, 1.5, True, "3"])
def test_a_window_or_chunk_without_slots_is_refused(argument: str, slots: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected a whole number of slots, at least 1, or None, got"):
        Visibility.causal(POSITIONS, **{argument: slots})


def test_the_smallest_window_and_chunk_show_a_row_itself() -> None:
    for argument in ("window", "chunk"):
        seen = Visibility.causal(POSITIONS, **{argument: np.int64(1)}).mask(1, 6)
        assert seen[0].nonzero().tolist() == [[0, 4], [1, 5]]


@pytest.mark.parametrize("positions", [None, [4, 5], POSITIONS.int(), POSITIONS.float(), torch.tensor(4)])
def test_positions_that_are_no_int64_rows_are_refused(positions: Any) -> None:
    with pytest.raises(ValueError, match=r"^q_positions: expected a \(T,\) or \(B, T\) int64 tensor, got"):
        Visibility.causal(positions)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_infinite_softcap_is_none(backend: Any) -> None:
    capped = attention_contribution(**GOOD, softcap=math.inf, backend=backend)
    plain = attention_contribution(**GOOD, backend=backend)
    torch.testing.assert_close(capped.span, plain.span, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [(name, value) for name in ("scale", "softcap") for value in (math.nan, -math.inf, "1", True)]
    + [("scale", math.inf), ("softcap", 0), ("softcap", -1.0)]
    + [(name, value) for name in ("query", "key", "value", "direction") for value in (None, [[1.0]])]
    + [
        ("visibility", None),
        ("sinks", [0.0] * 4),
        ("spans", None),
        ("spans", 3),
        ("spans", torch.ones(1, 1, 2).bool()),
    ],
)
def test_what_does_not_fit_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected "):
        attention_contribution(**(GOOD | {argument: value}))
    if argument != "direction":
        rest = {name: given for name, given in GOOD.items() if name != "direction"}
        with pytest.raises(ValueError, match=rf"^{argument}: expected "):
            attention_summary(**(rest | {argument: value}))


@pytest.mark.parametrize(("argument", "value"), [("attn", None), ("value", [1.0]), ("direction", 3), ("visible", [6])])
def test_what_does_not_fit_given_weights_is_named(argument: str, value: Any) -> None:
    good = {"attn": torch.rand(1, 4, 2, 6), "value": VALUE, "direction": DIRECTION, "spans": [(0, 3)]}
    with pytest.raises(ValueError, match=rf"^{argument}: expected "):
        ov_contribution(**(good | {argument: value}))
