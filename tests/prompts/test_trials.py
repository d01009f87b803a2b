"""A Trial whose fields cannot belong together is refused."""

from __future__ import annotations

import pytest

from locos_fast.prompts.trials import Trial


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("answer_ids", {"answer_ids": []}),
        ("needle_span", {"needle_span": (4, 4)}),
        ("needle_span", {"needle_span": (-1, 4)}),
        ("needle_span", {"needle_span": (4, 11)}),
        ("depth", {"depth": -0.1}),
        ("length", {"length": 9}),
    ],
)
def test_trial_refuses_impossible_fields(field: str, change: dict) -> None:
    fields = {
        "prompt_ids": list(range(10)),
        "needle_span": (2, 10),
        "answer_ids": [3],
        "question": "q",
        "needle": "n",
        "answer": "a",
        "depth": 0.0,
        "length": 10,
        "id": "t",
    }
    assert Trial(**fields).needle_span == (2, 10)
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        Trial(**{**fields, **change})
