"""record(verify=True) notices what the recorder misreads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locos_fast.models import attention_calls as calls_module
from locos_fast.models.attention_calls import AnswerRows
from locos_fast.scoring.recording import record
from tests.oracles.listening import registry
from tests.oracles.recordings import LENGTH, ROWS, SINKS, SPANS
from tests.oracles.tiny_models import PAIRS, UNCOMPILED_FLEX, build, tokens

pytestmark = [*UNCOMPILED_FLEX, pytest.mark.usefixtures("no_gradients")]


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict], dict]) -> None:
    """Let the recorder misread the arguments of attention; the model itself gets the right ones."""
    observe = AnswerRows.observe

    def misread(self: Any, module: nn.Module, name: str, qkv: tuple, mask: Any, output: Tensor, kwargs: dict) -> None:
        observe(self, module, name, qkv, mask, output, change(kwargs))

    monkeypatch.setattr(AnswerRows, "observe", misread)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])  # float32 is everywhere above
@pytest.mark.parametrize("family, attention", [pair for pair in PAIRS if pair[1] != "flex_attention"])
def test_verify_accepts_a_correct_reading(family: str, attention: str, dtype: torch.dtype) -> None:
    """Models round to their dtype, and eager attention takes its softmax in float32 even in a float64 model."""
    model = build(family, attention, dtype=dtype)
    with record(model, ROWS, SPANS, verify=True) as kept:
        model(tokens(2, LENGTH))
    assert len(kept) == 3


MISREADINGS = {
    "scale": ("llama", lambda kwargs: kwargs | {"scaling": 1.5 * kwargs["scaling"]}),
    "softcap": ("gemma2", lambda kwargs: kwargs | {"softcap": None}),
    "sinks": (SINKS, lambda kwargs: kwargs | {"s_aux": None}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, change", MISREADINGS.values(), ids=MISREADINGS.keys())
def test_verify_notices_a_misread_argument(
    monkeypatch: pytest.MonkeyPatch, family: str, change: Callable[[dict], dict], dtype: torch.dtype
) -> None:
    model, before = build(family, dtype=dtype), registry()
    tamper(monkeypatch, change)
    with (
        pytest.raises(RuntimeError, match=r"layer \d .* does not reproduce the head outputs"),
        record(model, ROWS, SPANS, verify=True),
    ):
        model(tokens(1, LENGTH))
    assert registry() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [{"first": 1}, {"last": -1}])
@pytest.mark.parametrize("family", ["llama", "mistral", "llama4"])
def test_verify_notices_a_misread_mask(
    monkeypatch: pytest.MonkeyPatch, family: str, shift: dict[str, int], dtype: torch.dtype
) -> None:
    """One key less at either end."""
    read = calls_module.read_visibility

    def misread(*args: Any, **kwargs: Any) -> list:
        (seen,) = read(*args, **kwargs)
        ends = {end: getattr(seen.visibility, end) + by for end, by in shift.items()}
        return [seen._replace(visibility=seen.visibility._replace(**ends))]

    monkeypatch.setattr(calls_module, "read_visibility", misread)
    model = build(family, "sdpa", dtype=dtype)
    with pytest.raises(RuntimeError, match="does not reproduce"), record(model, ROWS, SPANS, verify=True):
        model(tokens(1, LENGTH))
