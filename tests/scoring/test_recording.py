"""record() leaves a model as it is, and keeps of every attention layer exactly what the definition says.

Tolerances: a float64 model is compared with a float64 recomputation from its own queries, keys and values, where only
the order of the sums differs (EXACT). transformers' eager softmax works in float32 whatever the model's dtype, which
costs about 2^-24 per weight (SOFTMAX). Two float32 runs that should agree sum in a different order, which is worth a
few ulp of 2^-23 in each of the dozen matrix products up to the third layer (FLOAT32). All are relative to the largest
magnitude of what is compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    MambaConfig,
    PreTrainedModel,
    StaticCache,
)

from locos_fast.models import attention_calls as calls_module
from locos_fast.models.architecture import UnsupportedModelError, attention_layers, decoder
from locos_fast.models.attention_calls import AnswerRows
from locos_fast.models.attention_registry import eager_attention
from locos_fast.scoring.recording import LayerRecord, Recording, record
from tests.oracles.tiny_models import FAMILIES, PAIRS, VOCABULARY, WINDOW, build, one_thread, tokens, visible_keys

EXACT = 1e-11
SOFTMAX = 1e-6
FLOAT32 = 64 * 2**-23

LENGTH = 21  # more than twice the window, and odd
ROWS = [7, 13, 20]
SPANS = [(2, 5), (4, 12), (15, 17)]  # two overlap; a window of 8 reaches the first only from row 7
SINKS = "gpt_oss"

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers sets it
]


@pytest.fixture(scope="module", autouse=True)
def plain_torch() -> Iterator[None]:
    """flex_attention as ordinary tensor operations: the interface is the same, and compiling takes a minute."""
    with one_thread(), torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def registry() -> list[tuple[str, Callable]]:
    return list(AttentionInterface._global_mapping.items())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude expected; infinities and integers must agree exactly."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].double(), expected[~finite].double())
    error = (actual[finite].double() - expected[finite].double()).abs()
    bound = 0.0 if not expected.is_floating_point() else tolerance * float(expected[finite].abs().max())
    assert float(error.max()) <= bound


def assert_same_recording(actual: Recording, expected: Recording, tolerance: float) -> None:
    assert list(actual) == list(expected)
    for layer in expected:
        for have, want in zip(actual[layer], expected[layer], strict=True):
            assert_close(have, want, tolerance)


# --- padded batches


class Batch(NamedTuple):
    """Sequences of different lengths in one batch, as a model takes them."""

    inputs: dict[str, Tensor]
    offsets: list[int]  # slots of padding on the left of each batch row
    lengths: list[int]


def make_batch(padding: str | None) -> Batch:
    lengths = [LENGTH, LENGTH] if padding is None else [LENGTH, LENGTH - 5]
    offsets = [LENGTH - length if padding == "left" else 0 for length in lengths]
    ids, mask = tokens(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.int64)
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        mask[row, offset : offset + length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if padding is None:
        return Batch({"input_ids": ids}, offsets, lengths)
    return Batch({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, offsets, lengths)


PADDINGS = [None, "left", "right"]


# --- the model is left as it is


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family, attention", PAIRS)
def test_logits_stay_bit_identical(family: str, attention: str, padding: str | None) -> None:
    model, inputs = build(family, attention), make_batch(padding).inputs
    rows = torch.tensor([ROWS, [7, 13, 15]])  # slots that hold tokens, however the shorter sequence is padded
    plain = model(**inputs).logits
    with record(model, rows, SPANS, verify=True):
        recorded = model(**inputs).logits
    assert torch.equal(recorded, plain)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("family, attention", PAIRS)
def test_logits_stay_bit_identical_with_a_cache(family: str, attention: str) -> None:
    model, ids = build(family, attention), tokens(1, LENGTH)
    plain = run_in_chunks(model, ids, (9, 8, 2, 1, 1))
    with record(model, ROWS, SPANS, verify=True):
        recorded = run_in_chunks(model, ids, (9, 8, 2, 1, 1))
    assert all(map(torch.equal, recorded, plain))


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family, attention", PAIRS)
def test_generation_stays_bit_identical(family: str, attention: str, padding: str | None) -> None:
    model, inputs = build(family, attention), make_batch(padding).inputs
    inputs.pop("position_ids", None)
    generate = functools.partial(
        model.generate,
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    plain = generate()
    with record(model, [LENGTH - 1, LENGTH, LENGTH + 2], SPANS, verify=True) as recording:
        recorded = generate()
    assert torch.equal(recorded.sequences, plain.sequences)
    assert all(map(torch.equal, recorded.scores, plain.scores))
    assert len(recording) == 3


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_everything_is_put_back_after_an_exception(attention: str) -> None:
    model, ids, before = build("llama", attention), tokens(1, LENGTH), registry()
    hooks = len(decoder(model)._forward_hooks), len(decoder(model)._forward_pre_hooks)
    plain = model(ids).logits
    with pytest.raises(Interrupted), record(model, ROWS, SPANS):
        model(ids)
        raise Interrupted
    assert registry() == before
    assert (len(decoder(model)._forward_hooks), len(decoder(model)._forward_pre_hooks)) == hooks
    assert torch.equal(model(ids).logits, plain)


def test_everything_is_put_back_after_an_exception_inside_the_model() -> None:
    model, ids, before = build("llama", "sdpa"), tokens(1, LENGTH), registry()
    plain = model(ids).logits
    interrupt = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted), record(model, ROWS, SPANS):
        model(ids)
    interrupt.remove()
    assert registry() == before
    with record(model, ROWS, SPANS) as recording:
        assert torch.equal(model(ids).logits, plain)
    assert len(recording) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_only_the_implementation_in_use_is_wrapped(attention: str) -> None:
    model, before = build("gemma3", attention), dict(registry())
    config, masks = model.config.to_json_string(), dict(AttentionMaskInterface._global_mapping)
    with record(model, ROWS, SPANS):
        assert model.config.to_json_string() == config
        assert model.config._attn_implementation == attention
        assert AttentionMaskInterface._global_mapping == masks
        changed = {name for name, entry in registry() if before.get(name) is not entry}
        assert changed == {attention}
        model(tokens(1, LENGTH))


@pytest.mark.parametrize("family, attention", [pair for pair in PAIRS if pair[1] != "flex_attention"])
def test_attention_is_given_the_same_masks(family: str, attention: str) -> None:
    model, inputs = build(family, attention), make_batch("left").inputs
    with attention_calls(model) as plain:
        model(**inputs)
    with attention_calls(model) as recorded, record(model, ROWS, SPANS):
        model(**inputs)
    for layer in plain:
        assert torch.equal(recorded[layer].mask, plain[layer].mask)


# --- several recordings


def test_recordings_of_one_model_cannot_be_nested() -> None:
    model, ids, before = build("llama"), tokens(1, LENGTH), registry()
    with record(model, ROWS, SPANS) as outer:
        with pytest.raises(RuntimeError, match="cannot be nested"), record(model, ROWS, SPANS):
            pass
        model(ids)
    assert len(outer) == 3
    assert registry() == before


@pytest.mark.parametrize("attention", [("sdpa", "sdpa"), ("eager", "eager"), ("sdpa", "eager")])
def test_two_models_are_recorded_together_and_end_in_any_order(attention: tuple[str, str]) -> None:
    ids, before = tokens(1, LENGTH), registry()
    models = build("llama", attention[0]), build("qwen3", attention[1])
    alone = []
    for model in models:
        with record(model, ROWS, SPANS) as recording:
            model(ids)
        alone.append(recording)
    first, second = record(models[0], ROWS, SPANS), record(models[1], ROWS, SPANS)
    together = first.__enter__(), second.__enter__()
    models[0](ids)
    first.__exit__(None, None, None)  # the outer one ends first
    models[1](ids)
    second.__exit__(None, None, None)
    assert registry() == before
    for model in range(2):
        assert_same_recording(together[model], alone[model], tolerance=0)


def test_a_second_recording_of_a_model_starts_afresh() -> None:
    model, ids = build("llama", "sdpa"), tokens(2, LENGTH)
    recordings = []
    for batch in (ids[:1], ids[1:], ids[:1]):
        with record(model, ROWS, SPANS) as recording:
            model(batch)
        recordings.append(recording)
    assert_same_recording(recordings[2], recordings[0], tolerance=0)
    assert not torch.equal(recordings[1][0].lse, recordings[0][0].lse)


# --- what was never computed


def test_a_model_that_never_runs_is_an_error() -> None:
    missing = r"layer 0 .* never computed an answer row"
    with pytest.raises(RuntimeError, match=missing), record(build("llama"), [3], SPANS):
        pass


def test_a_layer_that_bypasses_the_interface_is_an_error() -> None:
    """GPT-2 computes reordered attention itself, although its source names the attention interface."""
    model = build("gpt2", "eager", reorder_and_upcast_attn=True)
    with pytest.raises(RuntimeError, match=r"layer 0 \(GPT2Attention\) never computed"), record(model, ROWS, SPANS):
        model(tokens(1, LENGTH))


@pytest.mark.parametrize("rows", [[3, LENGTH], torch.tensor([[3, 4], [5, LENGTH]])])
def test_a_row_that_is_never_computed_is_an_error(rows: Any) -> None:
    model = build("llama", "sdpa")
    missing = rf"rows \[{LENGTH}\] were never computed in layer 0"
    with pytest.raises(RuntimeError, match=missing), record(model, rows, SPANS):
        model(tokens(2, LENGTH))


@pytest.mark.parametrize("rows", [[], [-1], [[[1]]], torch.tensor(3)])
def test_rows_that_are_no_slots_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="rows: expected"), record(build("llama"), rows, SPANS):
        pass


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_another_batch_are_refused(batch: int) -> None:
    model = build("llama", "sdpa")
    with pytest.raises(ValueError, match="rows: expected"), record(model, torch.tensor([[3], [4]]), SPANS):
        model(tokens(batch, LENGTH))


@pytest.mark.parametrize("spans", [[], [(5, 3)], [(-1, 3)], torch.tensor([[[0, 2]], [[1, 3]]])])
def test_spans_that_fit_nothing_are_refused(spans: Any) -> None:
    model, before = build("llama", "sdpa"), registry()
    with pytest.raises(ValueError, match="spans: expected"), record(model, ROWS, spans):
        model(tokens(1, LENGTH))
    assert registry() == before


# --- what is recorded


class Call(NamedTuple):
    """What one layer's attention was given and gave back in the last forward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    output: Tensor  # (B, N, H, Dv)
    weights: Tensor | None


@contextmanager
def attention_calls(model: PreTrainedModel) -> Iterator[dict[int, Call]]:
    """Listen to the model's attention function. Entered outside `record`, it is what `record` wraps."""
    calls: dict[int, Call] = {}
    name = model.config._attn_implementation
    before = AttentionInterface._global_mapping.get(name)
    implementation = before or eager_attention(attention_layers(model)[0].module)

    def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
        result = implementation(module, query, key, value, mask, **kwargs)
        calls[module.layer_idx] = Call(query, key, value, mask, *result[:2])
        return result

    AttentionInterface.register(name, listen)
    try:
        yield calls
    finally:
        if before is None:
            del AttentionInterface._global_mapping[name]
        else:
            AttentionInterface.register(name, before)


@contextmanager
def projection_inputs(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> what the output projection was given, (B, N, heads * Dv)."""
    inputs: dict[int, Tensor] = {}
    hooks = [
        layer.projection.register_forward_pre_hook(
            lambda _, args, number=layer.number: inputs.update({number: args[0]})
        )
        for layer in attention_layers(model)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


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


# --- caches


def run_in_chunks(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, ...], cache: Any = None) -> list[Tensor]:
    cache = DynamicCache(config=model.config) if cache is None else cache
    return [model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)]


def recorded_at_once(model: PreTrainedModel, ids: Tensor) -> Recording:
    with record(model, ROWS, SPANS) as kept:
        model(ids, use_cache=False)
    return kept


CUTS = {"chunks": (5, 9, 4, 3), "prefill, then decode": (10, *[1] * 11), "decode": (1,) * 21}


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("family, attention", PAIRS)
def test_chunks_and_decode_steps_give_what_one_prefill_gives(
    family: str, attention: str, sizes: tuple[int, ...]
) -> None:
    model, ids = build(family, attention), tokens(2, LENGTH)
    cache = DynamicCache(config=model.config)
    with record(model, ROWS, SPANS, verify=True) as kept:
        run_in_chunks(model, ids, sizes, cache)
    assert_same_recording(kept, recorded_at_once(model, ids), FLOAT32)
    kept_keys = cache.layers[0].keys.shape[2]
    assert kept_keys == (LENGTH if visible_keys(model, 0, LENGTH)[-1, 0] else WINDOW - 1)  # windows do roll


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("family, attention", [pair for pair in PAIRS if pair[0] in ("mistral", "gemma3", "gpt_oss")])
def test_a_cache_that_keeps_what_the_window_hides_gives_the_same(
    family: str, attention: str, sizes: tuple[int, ...]
) -> None:
    model, ids = build(family, attention), tokens(1, LENGTH)
    with record(model, ROWS, SPANS, verify=True) as kept:
        run_in_chunks(model, ids, sizes, DynamicCache())
    assert_same_recording(kept, recorded_at_once(model, ids), FLOAT32)


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("family, attention", [pair for pair in PAIRS if pair[1] != "flex_attention"])
def test_a_static_cache_gives_what_one_prefill_gives(family: str, attention: str, sizes: tuple[int, ...]) -> None:
    """Its keys are a buffer of fixed size: slots that are not filled yet are hidden, rolled ones are counted.

    Not for flex_attention: there transformers' mask reads the length of the cache after the cache was updated, so that
    the model itself sees slots it should not.
    """
    model, ids = build(family, attention), tokens(1, LENGTH)
    with record(model, ROWS, SPANS, verify=True) as kept:
        run_in_chunks(model, ids, sizes, StaticCache(config=model.config, max_cache_len=LENGTH + 6))
    assert_same_recording(kept, recorded_at_once(model, ids), FLOAT32)


def test_generated_rows_are_recorded() -> None:
    model, ids = build("gemma3", "sdpa"), tokens(1, LENGTH - 3)
    with record(model, ROWS, SPANS) as kept:
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert_same_recording(kept, recorded_at_once(model, generated[:, :LENGTH]), FLOAT32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_queries_keys_and_values_do_not_outlive_their_layer(family: str, attention: str) -> None:
    model, ids = build(family, attention), tokens(1, LENGTH)
    alive, storages = [], []

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
        alive.extend(not storage.expired() for storage in storages)
        storages[:] = [StorageWeakRef(x.untyped_storage()) for x in (query, key, value)]
        assert not any(storage.expired() for storage in storages)
        return implementation(module, query, key, value, *args, **kwargs)

    before = AttentionInterface._global_mapping.get(attention)
    implementation = before or eager_attention(attention_layers(model)[0].module)
    AttentionInterface.register(attention, watch)
    try:
        with record(model, ROWS, SPANS, verify=True):
            model(ids, use_cache=False)
    finally:
        if before is None:
            del AttentionInterface._global_mapping[attention]
        else:
            AttentionInterface.register(attention, before)
    alive.extend(not storage.expired() for storage in storages)
    assert alive == [False] * 9


def test_a_recording_holds_no_more_memory_than_its_numbers() -> None:
    model = build("llama", "sdpa")
    with record(model, [LENGTH - 1], SPANS) as kept:
        model(tokens(1, LENGTH))
    for field in kept[0]:
        assert field.untyped_storage().nbytes() == field.numel() * field.element_size()


# --- verify


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


# --- models that cannot be recorded


def refuse(model: nn.Module, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as error, record(model, ROWS, SPANS):
        model(tokens(1, LENGTH))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, dropout", [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_is_refused(family: str, dropout: str) -> None:
    before = registry()
    refuse(build(family, "sdpa", **{dropout: 0.1}).train(), "applies (attention )?dropout; call model.eval()")
    assert registry() == before


def test_training_mode_without_dropout_is_recorded() -> None:
    model = build("llama", "sdpa").train()
    with record(model, ROWS, SPANS, verify=True) as kept:
        model(tokens(1, LENGTH))
    assert len(kept) == 3


def compile_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def compile_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward)
    return model


def compile_decoder(model: nn.Module) -> nn.Module:
    model.model = torch.compile(model.model)
    return model


def compile_layer(model: nn.Module) -> nn.Module:
    model.model.layers[1].compile()
    return model


@pytest.mark.parametrize(
    "how, name",
    [
        (compile_whole, "LlamaForCausalLM"),
        (compile_in_place, "LlamaForCausalLM"),
        (compile_forward, "LlamaForCausalLM"),
        (compile_decoder, "LlamaModel"),
        (compile_layer, "LlamaDecoderLayer"),
    ],
)
def test_compiled_models_are_refused(how: Callable[[nn.Module], nn.Module], name: str) -> None:
    refuse(how(build("llama", "sdpa")), f"{name} is compiled, which cannot be recorded")


class DTensor(nn.Parameter):
    """Looks to the recorder like a shard of a tensor-parallel weight."""


def test_tensor_parallel_models_are_refused() -> None:
    model = build("llama", "sdpa")
    model.lm_head.weight = DTensor(model.lm_head.weight.data)
    refuse(model, "LlamaForCausalLM is tensor-parallel")


def test_weights_on_the_meta_device_are_refused() -> None:
    model = build("llama", "sdpa")
    model.lm_head.to("meta")
    refuse(model, r"LlamaForCausalLM has weights on the meta device \(lm_head.weight\)")


TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


def test_attention_outside_the_interface_is_refused() -> None:
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**TINY, num_attention_heads=4)).eval()
    refuse(falcon, "FalconForCausalLM cannot be recorded: FalconAttention computes attention itself")


def test_models_without_attention_are_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**TINY, state_size=8)).eval()
    refuse(mamba, "MambaForCausalLM has no softmax attention layers")


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
