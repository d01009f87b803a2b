"""The memory that shared beginnings take: what is said before the weights are read is what the caches then hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from locos_fast.models import cache_memory, memory_estimate
from locos_fast.models.cache_memory import STATE_BYTES, CachedLayer, Way, cache_bytes, cached_layers, largest_cache
from locos_fast.models.memory_estimate import estimate, fits_with_cache
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.prompts.prefix_tree import passes, prefix_tree
from tests.oracles import further_families
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.tiny_models import WINDOW, tokens

STATES = {"qwen3_next"}  # of linear attention, some kept in float32 and some in the model's dtype
CHAINS = [(2 * WINDOW + 5,), (WINDOW - 3,), (5, 7), (WINDOW + 3, 2 * WINDOW, 2 * WINDOW + 9)]
DTYPES = [torch.float32, torch.bfloat16]

with torch.device("meta"):  # PyTorch asks once what its device contexts apply to: before a test replaces torch.empty
    torch.ones(1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def read_again(config: PreTrainedConfig) -> PreTrainedConfig:
    """As it comes from a file, without what was chosen for the model that was built from it."""
    return type(config).from_dict(config.to_dict())


def storages(held: Any) -> dict[int, int]:
    """Bytes of every piece of memory that tensors with fractions look at, by its address."""
    if isinstance(held, Tensor):
        whole = held.untyped_storage()
        return {whole.data_ptr(): whole.nbytes()} if held.is_floating_point() else {}
    inner = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
    return {place: size for value in inner for place, size in storages(value).items()}


def tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    for value in held.values() if isinstance(held, dict) else held if isinstance(held, list) else ():
        yield from tensors(value)


def held_after(prefix: PrefixCache, ids: Tensor, ends: tuple[int, ...], rows: int = 1) -> int:
    """Bytes of keys, values and states that are in memory behind the last pass, of those that any pass has put into the
    cache, each branching from the one before; the last with so many rows."""
    seen: list[weakref.ref[Tensor]] = []

    def look() -> None:
        seen.extend(weakref.ref(x) for layer in prefix.cache.layers for x in tensors(vars(layer)))

    def go_on(ends: tuple[int, ...]) -> int:
        rest = ids[:, prefix.tokens : ends[0]]
        prefix.extend(rest if ends[1:] else rest.expand(rows, -1))
        look()
        if not ends[1:]:
            return sum(storages([x for ref in seen if (x := ref()) is not None]).values())
        with prefix.branch() if ends[2:] or rows == 1 else prefix.branches(rows):
            return go_on(ends[1:])

    return go_on(ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STATES])
def test_bytes_are_those_that_the_caches_hold(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    layers = cached_layers(read_again(model.config))
    for ends in CHAINS:
        ids = tokens(1, ends[-1])
        if family == "gemma3_vision":
            model, ids = build(family, dtype=dtype), ids.clamp(max=50)  # the last ids stand for pictures
        assert cache_bytes(layers, Way(ends), dtype) == held_after(PrefixCache(model), ids, ends), ends


@pytest.mark.parametrize("name", ["DeepseekV2", "GPTBigCode", "BioGpt", "Youtu", "Exaone4"])
def test_latents_single_heads_and_models_that_cannot_be_asked(name: str) -> None:
    model = further_families.build(name)
    ends = CHAINS[-1]
    found = held_after(PrefixCache(model), tokens(1, ends[-1]), ends)
    assert cache_bytes(cached_layers(read_again(model.config)), Way(ends), torch.float32) == found


@pytest.mark.parametrize("name", ["Lfm2"])
def test_states_that_do_not_grow_are_counted(name: str) -> None:
    model = further_families.build(name)
    layers, ends = cached_layers(read_again(model.config)), (11,)
    grown = [layer for layer in layers if layer.per_token]
    assert 0 < len(grown) < len(layers) and all(layer.states for layer in layers if not layer.per_token)
    found = held_after(PrefixCache(model), tokens(1, 11), ends)
    assert cache_bytes(layers, Way(ends), torch.float32) == found


def test_layers_that_share_keys_take_nothing() -> None:
    """Older releases of transformers do not even list them."""
    own, sharing = [2 * 2 * 16, 2 * 2 * 24], [0, 0]
    found = [layer.per_token for layer in cached_layers(build("gemma4").config)]
    assert found in ([*own, *sharing], own)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gemma4", "llama4"])
def test_rows_side_by_side_are_counted_beside_what_they_start_from(family: str) -> None:
    model = build(family, dtype=torch.float32)
    layers = cached_layers(read_again(model.config))
    for ends in CHAINS[2:]:
        found = held_after(PrefixCache(model), tokens(1, ends[-1]), ends, rows=3)
        assert cache_bytes(layers, Way(ends, 3, 2**30), torch.float32) == found, ends


def test_a_window_is_kept_beside_the_tokens_of_each_pass() -> None:
    layer = CachedLayer(per_token=10, window=8, states=3)
    assert layer.bytes((20,), 2) == 20 * 10 * 2 + 3 * STATE_BYTES
    assert layer.bytes((20, 25), 2) == (20 + 7 + 5) * 10 * 2 + 2 * 3 * STATE_BYTES
    assert layer._replace(window=None).bytes((20, 25), 4) == (20 + 25) * 10 * 4 + 2 * 3 * 4
    assert cache_bytes([layer], Way(()), torch.float32) == 0


def test_a_cropped_layer_is_there_once_however_many_passes_led_to_it() -> None:
    layer = CachedLayer(per_token=10, window=None, cropped=True)
    assert layer.bytes(tuple(range(1, 101)), 2) == layer.bytes((100,), 2) == 100 * 10 * 2
    assert layer.bytes((20, 25), 2, rows=4) == (20 + 4 * 25) * 10 * 2


def test_rows_for_whose_copies_there_is_no_room_are_not_counted() -> None:
    layers = [CachedLayer(10, None, cropped=True), CachedLayer(10, 8)]
    one = (20 + 7) * 10 * 4  # bytes of the beginning
    for room, rows in ((8 * one, 5), (3 * one, 3), (3 * one - 1, 2), (one, 1), (0, 1)):
        expected = sum(layer.bytes((20, 25), 4, rows) for layer in layers)
        assert cache_bytes(layers, Way((20, 25), 5, room), torch.float32) == expected, room
    states = [CachedLayer(0, None, states=3), *layers]
    assert cache_bytes(states, Way((20, 25), 5, 2**30), torch.float32) == cache_bytes(
        states, Way((20, 25)), torch.float32
    )


def test_each_layer_is_counted_at_its_own_largest() -> None:
    """A cropped layer may still keep what one trial had added while a window is already at another's."""
    full, window = CachedLayer(10, None, cropped=True), CachedLayer(10, 8)
    long, winding = Way((10, 100)), Way((30, 60, 90, 95))
    found = largest_cache([full, window], [long, winding, Way(())], torch.float32)
    assert found == full.bytes(long.ends, 4) + max(window.bytes(way.ends, 4) for way in (long, winding))
    assert largest_cache([full, window], [], torch.float32) == 0


def test_a_model_whose_keys_depend_on_the_length_shares_nothing() -> None:
    model = build("llama")
    config = type(model.config)(
        **{**model.config.to_dict(), "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    )
    config.rope_parameters["rope_theta"] = 10000.0
    assert cached_layers(config) == []


def test_what_a_model_without_memory_cannot_say_is_taken_from_its_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = build("gemma2").config
    asked = cached_layers(config)

    def fail(prefix: PrefixCache) -> dict[str, Any]:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(PrefixCache, "forward_arguments", fail)
    assert cached_layers(config) == asked


# --- of trials


def test_passes_lead_from_beginning_to_beginning_and_end_with_the_trial() -> None:
    common = list(range(100))
    sequences = [[*common, 1, 2], [*common[:60], 7, 7, 7], [*common[:60], 8], [*common, 3], [9, 9, 9]]
    tree = prefix_tree(sequences, [len(sequence) for sequence in sequences])
    found = sorted(passes(sequences, tree))
    assert found == [[], [60, 61], [60, 63], [60, 100, 101], [60, 100, 102]]


def test_passes_are_what_the_walk_does() -> None:
    """In the order of the tree, each trial with the caches that lie between it and nothing."""
    sequences = [[*range(50), 1], [*range(50), 2], [*range(25), 3]]
    tree = prefix_tree(sequences, [len(sequence) for sequence in sequences])
    found = dict(zip(tree.sequences(), passes(sequences, tree), strict=True))
    assert found == {0: [25, 50, 51], 1: [25, 50, 51], 2: [25, 26]}


def test_the_largest_way_is_part_of_the_estimate() -> None:
    config = build("llama").config
    plain = estimate(config, 100, torch.float32, "sdpa")
    ways = [Way(()), Way((60, 70)), Way((90, 100))]
    shared = estimate(config, 100, torch.float32, "sdpa", cached=ways)
    assert plain.cache == 0
    assert shared.cache == cache_bytes(cached_layers(config), ways[-1], torch.float32)
    assert shared.total == plain.total + shared.cache
    assert "cache" in str(shared)


def test_what_fits_only_without_cache_is_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device, ways = build("llama").config, torch.device("cpu"), [Way((90, 100))]
    plain = estimate(config, 100, torch.float32, "sdpa")
    whole = estimate(config, 100, torch.float32, "sdpa", cached=ways)
    monkeypatch.setattr(memory_estimate, "available", lambda device: whole.total)
    assert fits_with_cache(config, 100, torch.float32, "sdpa", device, ways).fits
    monkeypatch.setattr(memory_estimate, "available", lambda device: whole.total - 1)
    found = fits_with_cache(config, 100, torch.float32, "sdpa", device, ways)
    assert not found.fits and "each trial is run on its own" in str(found)
    assert memory_estimate.refuse_if_too_large(config, 100, torch.float32, "sdpa", device) == plain


def test_a_run_that_generates_is_refused_without_room_for_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = build("llama").config, torch.device("cpu")

    def refused(tokens: int, *, generating: bool) -> memory_estimate.MemoryEstimate:
        return memory_estimate.refuse_if_too_large(config, tokens, torch.float32, "sdpa", device, generating=generating)

    whole = estimate(config, 1000, torch.float32, "sdpa", cached=[Way((1000,))])
    monkeypatch.setattr(memory_estimate, "available", lambda device: whole.total)
    assert refused(1000, generating=True) == whole
    monkeypatch.setattr(memory_estimate, "available", lambda device: whole.total - 1)
    assert refused(1000, generating=False).cache == 0
    with pytest.raises(ValueError, match="about 999 tokens would fit"):
        refused(1000, generating=True)
    assert refused(999, generating=True).total < whole.total


def test_nothing_shared_asks_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_memory, "PrefixCache", None)  # would raise
    assert estimate(build("llama").config, 100, torch.float32, "sdpa", cached=[Way(()), Way(())]).cache == 0
