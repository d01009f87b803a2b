"""record() keeps of every attention layer exactly what the definition says; tests/oracles/recordings.py explains the
tolerances."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.architecture import attention_layers
from locos_fast.scoring.recording import LayerRecord, record
from tests.oracles.listening import Call, attention_calls, projection_inputs
from tests.oracles.recordings import (
    EXACT,
    FLOAT32,
    LENGTH,
    PADDINGS,
    ROWS,
    SINKS,
    SOFTMAX,
    SPANS,
    assert_close,
    assert_same_recording,
    make_batch,
    recorded_at_once,
    run_in_chunks,
)
from tests.oracles.tiny_models import FAMILIES, PAIRS, UNCOMPILED_FLEX, build, tokens, visible_keys

pytestmark = [*UNCOMPILED_FLEX, pytest.mark.usefixtures("no_gradients")]


class Naive(NamedTuple):
    alpha: Tensor  # (B, H, N, N)
    lse: Tensor  # (B, H, N)
    seen: Tensor  # (B, N, N)
    value: Tensor  # (B, H, N, Dv)


def naive_attention(model: PreTrainedModel, layer: int, call: Call, offsets: list[int]) -> Naive:
    """Attention by its definition in float64; scale, softcap, sinks and windows are those of the configuration."""
    config, module = model.config, attention_layers(model)[layer].module
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * getattr(config, "query_pre_attn_scalar", query.shape[-1]) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    seen = torch.stack([visible_keys(model, layer, scores.shape[-1], offset) for offset in offsets])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    logits = scores
    if hasattr(module, "sinks"):
        sinks = module.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, sinks], dim=-1)
    lse = logits.logsumexp(-1)
    return Naive((scores - lse[..., None]).exp(), lse, seen, value)


def naive_record(naive: Naive, output: Tensor, rows: Tensor, spans: Tensor) -> LayerRecord:
    """The definition of a record; rows (B, T) and spans (B, S, 2) in slots."""
    parts = []
    for b, (mine, own) in enumerate(zip(rows.tolist(), spans.tolist(), strict=True)):
        alpha, seen = naive.alpha[b, :, mine], naive.seen[b, mine]  # (H, T, N), (T, N)
        cut = [slice(start, end) for start, end in own]
        parts.append(
            LayerRecord(
                output=output[b, mine],
                span_output=torch.stack([alpha[..., s] @ naive.value[b, :, s] for s in cut], dim=2),
                mass=torch.stack([alpha[..., s].sum(-1) for s in cut], dim=-1),
                total_mass=alpha.sum(-1),
                lse=naive.lse[b, :, mine],
                argmax=alpha.argmax(-1),
                visible=seen.sum(-1),
                span_visible=torch.stack([seen[:, s].sum(-1) for s in cut], dim=-1),
            )
        )
    return LayerRecord(*map(torch.stack, zip(*parts, strict=True)))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family, attention", PAIRS)
def test_a_recording_is_the_definition_applied_to_queries_keys_and_values(
    family: str, attention: str, padding: str | None
) -> None:
    """Full, windowed, chunked, softcapped and sink layers; rows and spans of its own for each batch row."""
    eager = attention == "eager"
    # in float64 transformers' eager softmax turns the rows of padding, which see nothing, into NaN
    dtype, tolerance = (torch.float32, FLOAT32) if eager and padding == "left" else (torch.float64, EXACT)
    model, batch = build(family, attention, dtype=dtype), make_batch(padding)
    offsets = torch.tensor(batch.offsets)[:, None]
    rows = torch.tensor([[7, 13, 20], [6, 11, 15]]) + offsets
    spans = torch.tensor([SPANS, [(0, 1), (5, 14), (12, 13)]]) + offsets[..., None]
    with attention_calls(model) as calls, projection_inputs(model) as projected, record(model, rows, spans) as kept:
        model(**batch.inputs, output_attentions=eager)
    for layer, call in calls.items():
        naive = naive_attention(model, layer, call, batch.offsets)
        expected = naive_record(naive, projected[layer].view_as(call.output), rows, spans)
        for have, want in zip(kept[layer], expected, strict=True):
            assert_close(have, want, tolerance)
        picked = torch.arange(2)[:, None], rows
        output = (naive.alpha @ naive.value).transpose(1, 2)[picked]
        assert_close(kept[layer].output, output, SOFTMAX)
        if eager:
            weights = call.weights.transpose(1, 2)[picked]
            assert_close(weights, naive.alpha.transpose(1, 2)[picked], SOFTMAX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_outputs_are_what_the_output_projection_is_given(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    with projection_inputs(model) as projected, record(model, ROWS, SPANS, verify=True) as kept:
        model(tokens(2, LENGTH))
    for layer, output in projected.items():
        assert kept[layer].output.dtype == dtype
        assert torch.equal(kept[layer].output.flatten(2), output[:, ROWS])
        assert all(field.dtype in (torch.float32, torch.int64) for field in kept[layer][1:])


def test_sinks_take_their_share_of_the_attention() -> None:
    model = build(SINKS)
    with record(model, ROWS, SPANS) as kept:
        model(tokens(1, LENGTH))
    assert all(float(kept[layer].total_mass.max()) < 1 for layer in kept)


def test_a_recording_is_a_mapping_in_layer_order() -> None:
    model = build("llama")
    with record(model, ROWS, SPANS) as kept:
        model(tokens(1, LENGTH))
    assert list(kept) == [0, 1, 2]
    assert len(kept) == 3
    with pytest.raises(KeyError):
        kept[3]


# --- padding


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family, attention", PAIRS)
def test_a_padded_batch_row_gives_what_it_gives_alone(family: str, attention: str, padding: str) -> None:
    model, batch = build(family, attention), make_batch(padding)
    own_rows, own_spans = torch.tensor([[7, 13, 20], [6, 11, 15]]), torch.tensor([SPANS, [(0, 1), (5, 14), (12, 13)]])
    offsets = torch.tensor(batch.offsets)[:, None]
    with record(model, own_rows + offsets, own_spans + offsets[..., None]) as together:
        model(**batch.inputs)
    for b, (offset, length) in enumerate(zip(batch.offsets, batch.lengths, strict=True)):
        ids = batch.inputs["input_ids"][b : b + 1, offset : offset + length]
        with record(model, own_rows[b : b + 1], own_spans[b : b + 1]) as alone:
            model(ids)
        for layer, expected in alone.items():
            part = LayerRecord(*(field[b : b + 1] for field in together[layer]))
            part = part._replace(argmax=part.argmax - offset)  # slots count the padding
            for have, want in zip(part, expected, strict=True):
                assert_close(have, want, FLOAT32)


def test_a_recording_holds_no_more_memory_than_its_numbers() -> None:
    model = build("llama", "sdpa")
    with record(model, [LENGTH - 1], SPANS) as kept:
        model(tokens(1, LENGTH))
    for field in kept[0]:
        assert field.untyped_storage().nbytes() == field.numel() * field.element_size()


# --- models in several places


@pytest.mark.parametrize(
    "device_map",
    [{"": "cpu"}, {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.rotary_emb": "cpu"}],
    ids=["whole", "pieces"],
)
def test_dispatched_models_are_recorded(device_map: dict[str, str]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = build("gemma3", "sdpa"), tokens(1, LENGTH)
    expected = recorded_at_once(model, ids)
    if "" not in device_map:
        device_map = {**device_map, "model.norm": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(model, device_map, force_hooks=True)
    assert hasattr(model, "_hf_hook") or hasattr(model.model.layers, "_hf_hook")
    with record(model, ROWS, SPANS, verify=True) as kept:
        run_in_chunks(model, ids, (10, *[1] * 11))
    assert_same_recording(kept, expected, FLOAT32)
