"""What a scored layer asks of a GPU: few launches, and never a wait. Counted without a GPU, on tensors without memory.

The kernels are replaced by something that counts; everything around them runs as it would. On the meta device every
attempt of the host to look at a value raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from locos_fast.models.architecture import attention_layers
from locos_fast.models.attention_calls import AnswerRows
from locos_fast.models.residual_stream import take_rows
from locos_fast.ops import functions
from locos_fast.ops.attention import Attention
from locos_fast.ops.backends import Backend
from locos_fast.ops.visibility import Visibility, count_keys
from locos_fast.scoring.attribute_tokens import _SegmentSums
from locos_fast.scoring.recording import _Kept
from tests.oracles.tiny_models import build

pytest.importorskip("triton")

from locos_fast.ops import triton_backend
from tests.kernels.launch_counts import KERNELS, Operators, count_launches

BATCH, KV_HEADS, GROUP, ROWS, KEYS, DIM = 1, 8, 4, 8, 102_400, 128


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    direction: Tensor
    visibility: Visibility


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was launched, in order."""
    return count_launches(monkeypatch)


@pytest.fixture
def inputs() -> Inputs:
    def tensor(heads: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty((BATCH, heads, length, DIM), dtype=dtype, device="meta")

    heads = KV_HEADS * GROUP
    visibility = Visibility.causal(torch.arange(KEYS - ROWS, KEYS)[None])
    return Inputs(
        tensor(heads, ROWS),
        tensor(KV_HEADS, KEYS),
        tensor(KV_HEADS, KEYS),
        tensor(heads, ROWS, torch.float32),
        visibility.to(torch.device("meta")),
    )


def spans_of(count: int) -> Tensor:
    size = KEYS // count
    return torch.tensor([[(i * size, (i + 1) * size) for i in range(count)]])


def test_a_summary_is_three_launches_and_no_wait(launched: list[str], inputs: Inputs) -> None:
    query, key, value, _, visibility = inputs
    attention = Attention(query, key, value, visibility, scale=0.1)
    spans = spans_of(100)
    counts = count_keys(visibility, spans.to("meta"), BATCH, KEYS)
    with Operators(launched):
        triton_backend.attention_summary(attention, spans, counts)  # plans are kept
        launched.clear()
        triton_backend.attention_summary(attention, spans, counts)
    assert launched == ["attention_summary_split", "combine_splits", "span_output"]


@pytest.mark.parametrize("count", [1, 1000, 20_000])
def test_a_contribution_is_one_pass_however_many_spans(launched: list[str], inputs: Inputs, count: int) -> None:
    query, key, value, direction, visibility = inputs
    spans = spans_of(count)
    counts = count_keys(visibility, spans.to("meta"), BATCH, KEYS)
    attention = Attention(query, key, value, visibility, scale=0.1)
    triton_backend.attention_contribution(attention, direction, spans, counts)
    launched.clear()
    with Operators(launched):
        triton_backend.attention_contribution(attention, direction, spans, counts)
    # a pair that nobody writes, its tile being hidden from every row, keeps what it is filled with
    assert launched == ["fill", "attention_contribution_split", "combine_splits", "combine_spans"]


def test_given_weights_are_one_pass_however_many_spans(launched: list[str], inputs: Inputs) -> None:
    attn = torch.empty((BATCH, KV_HEADS * GROUP, ROWS, KEYS), dtype=torch.bfloat16, device="meta")
    spans, visible = spans_of(20_000), torch.empty((BATCH, ROWS), dtype=torch.int64, device="meta")
    triton_backend.ov_contribution(attn, inputs.value, inputs.direction, spans, visible=visible)
    launched.clear()
    with Operators(launched):
        triton_backend.ov_contribution(attn, inputs.value, inputs.direction, spans, visible=visible)
    assert launched == ["ov_contribution_split", "combine_sums", "combine_spans"]


@pytest.fixture
def scored_layers(launched: list[str], inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> Scored:
    """Attention calls and what goes into the output projection, of a prefill on the meta device."""
    monkeypatch.setattr(
        functions, "backend_for", lambda backend, tensor: Backend("triton", triton_backend, plans_on_host=True)
    )
    model = build("llama", "sdpa", num_attention_heads=KV_HEADS * GROUP, num_key_value_heads=KV_HEADS, head_dim=DIM)
    query = torch.empty((BATCH, KV_HEADS * GROUP, KEYS, DIM), dtype=torch.bfloat16, device="meta")
    return Scored(model, list(range(KEYS - ROWS, KEYS)), (query, inputs.key, inputs.value), query.transpose(1, 2))


class Scored(NamedTuple):
    model: Any
    rows: list[int]
    qkv: tuple[Tensor, Tensor, Tensor]
    output: Tensor


def test_recording_adds_four_launches_to_a_layer_and_no_wait(launched: list[str], scored_layers: Scored) -> None:
    """Three kernels and the copy of the head outputs at the answer rows; masks are read once for all layers."""
    model, rows, qkv, output = scored_layers
    spans = torch.tensor([[(100, 132)]])
    kept = _Kept(ROWS, spans, verify=False)
    observer = AnswerRows(model, rows, spans, "triton", kept.receive, None)
    observer.tokens = KEYS
    for layer in attention_layers(model):
        launched.clear()
        with Operators(launched):
            observer.observe(layer.module, "sdpa", qkv, None, output, {"scaling": 0.1})
    assert launched == ["clone", "attention_summary_split", "combine_splits", "span_output"]
    assert kept.recording[2].span_output.shape == (BATCH, KV_HEADS * GROUP, ROWS, 1, DIM)


def test_following_what_is_projected_is_one_copy_and_no_wait(launched: list[str], scored_layers: Scored) -> None:
    projected = scored_layers.output.flatten(2)
    with Operators(launched):
        taken = take_rows(projected, scored_layers.rows)
    assert taken.shape == (ROWS, KV_HEADS * GROUP * DIM)
    assert launched == ["clone"]


def test_attributing_a_layer_never_waits(launched: list[str], scored_layers: Scored) -> None:
    """Once plans are kept; what it launches beside the kernels is small: (rows x width) tensors."""
    model, rows, qkv, output = scored_layers
    table = spans_of(1000)
    sums = _SegmentSums(table, rows)
    sums.direction = torch.empty((ROWS, model.config.hidden_size), device="meta")
    observer = AnswerRows(model, rows, table, "triton", sums.receive, None)
    observer.tokens = KEYS
    for layer in attention_layers(model):
        layer.projection.to("meta")
        launched.clear()
        with Operators(launched):
            observer.observe(layer.module, "sdpa", qkv, None, output, {"scaling": 0.1})
            sums._project(layer.projection, (output.flatten(2),), {})
    assert [name for name in launched if name in KERNELS] == [
        "attention_contribution_split",
        "combine_splits",
        "combine_spans",
    ]
    assert len(launched) <= 24
    assert sums.layers[2].shape == (KV_HEADS * GROUP, 1000)
