"""A model under record() gives the bits it gives without, and is afterwards what it was before."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AttentionMaskInterface

from locos_fast.models.architecture import decoder
from locos_fast.scoring.recording import record
from tests.oracles.listening import attention_calls, registry
from tests.oracles.recordings import LENGTH, PADDINGS, ROWS, SPANS, assert_same_recording, make_batch, run_in_chunks
from tests.oracles.tiny_models import PAIRS, UNCOMPILED_FLEX, build, tokens

pytestmark = [*UNCOMPILED_FLEX, pytest.mark.usefixtures("no_gradients")]


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
