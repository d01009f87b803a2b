"""With a cache, in chunks or token by token, a recording is that of one forward pass."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, DynamicCache, StaticCache

from locos_fast.models.architecture import attention_layers
from locos_fast.models.attention_registry import eager_attention
from locos_fast.scoring.recording import record
from tests.oracles.recordings import (
    FLOAT32,
    LENGTH,
    ROWS,
    SPANS,
    assert_same_recording,
    recorded_at_once,
    run_in_chunks,
)
from tests.oracles.tiny_models import PAIRS, UNCOMPILED_FLEX, WINDOW, build, tokens, visible_keys

pytestmark = [*UNCOMPILED_FLEX, pytest.mark.usefixtures("no_gradients")]

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
