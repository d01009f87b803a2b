"""A shared beginning: what continues from it computes what the whole prompt does, and leaves no trace."""

import contextlib
import weakref

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.prefix_cache import PrefixCache, cache_argument
from tests.oracles import further_families
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.tiny_models import WINDOW, tokens

PREFIX, LENGTH = 2 * WINDOW + 3, 3 * WINDOW + 4  # beyond windows and chunks
ROUNDING = 1e-5  # float32: the same sums in another order; transformers' norms and softmax work in it in any dtype
WITH_LOGITS = [name for name in FAMILIES if name != "gemma3_vision"]  # it wants to be told which tokens are text


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def logits(model: nn.Module, shared: PrefixCache, rest: torch.Tensor) -> torch.Tensor:
    with shared.branch():
        return model(input_ids=rest, **shared.forward_arguments()).logits


@pytest.mark.parametrize("family", WITH_LOGITS)
def test_continuations_equal_the_whole_and_do_not_disturb_each_other(family: str) -> None:
    model = build(family, "eager")
    first, second = tokens(1, LENGTH), tokens(1, LENGTH, seed=1)
    second[:, :PREFIX] = first[:, :PREFIX]
    shared = PrefixCache(model)
    shared.extend(first[:, : PREFIX - 5])
    shared.extend(first[:, PREFIX - 5 : PREFIX])
    assert shared.tokens == PREFIX
    for whole in (first, second, first):
        expected = model(input_ids=whole, use_cache=False).logits[:, PREFIX:]
        found = logits(model, shared, whole[:, PREFIX:])
        assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
        assert shared.tokens == PREFIX


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_a_branch_gives_the_same_bits_again_after_another_and_after_an_exception(family: str) -> None:
    model = build(family, "eager")
    ids, shared = tokens(1, LENGTH), PrefixCache(model)
    shared.extend(ids[:, :PREFIX])
    before = logits(model, shared, ids[:, PREFIX:])
    with pytest.raises(RuntimeError, match="stop"), shared.branch():
        model(input_ids=ids[:, :7], **shared.forward_arguments())
        raise RuntimeError("stop")
    with shared.branch():
        shared.extend(ids[:, :9])
    assert torch.equal(logits(model, shared, ids[:, PREFIX:]), before)


ENDS = (9, PREFIX - 5, PREFIX)


def grown(model: nn.Module, ids: torch.Tensor) -> PrefixCache:
    shared = PrefixCache(model)
    for start, end in zip((0, *ENDS), ENDS, strict=False):
        shared.extend(ids[:, start:end])
    return shared


def same(ours: object, theirs: object) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    return len(ours) == len(theirs) and all(map(same, ours, theirs)) if isinstance(ours, list) else ours == theirs


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "llama4", "deepseek_v3", "qwen3_next"])
def test_branches_in_branches_leave_every_level_as_if_there_had_been_none(family: str) -> None:
    """To the bit: against caches that were extended by the same passes and never branched from."""
    model = build(family, "eager")
    ids, shared = tokens(1, LENGTH), PrefixCache(model)

    def check(level: int) -> None:
        alone = PrefixCache(model)
        for start, end in zip((0, *ENDS), ENDS[:level], strict=False):
            alone.extend(ids[:, start:end])
        assert shared.ids == alone.ids
        for found, expected in zip(shared.cache.layers, alone.cache.layers, strict=True):
            assert same(vars(found), vars(expected))
        rest = ids[:, ENDS[level - 1] :]
        assert torch.equal(logits(model, shared, rest), logits(model, alone, rest))

    def descend(level: int) -> None:
        shared.extend(ids[:, shared.tokens : ENDS[level - 1]])
        if level < len(ENDS):
            with shared.branch():
                descend(level + 1)
        check(level)

    descend(1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_branch_keeps_no_second_copy_of_full_layers(family: str) -> None:
    model = build(family, "eager")
    ids, shared = tokens(1, LENGTH), grown(model, tokens(1, LENGTH))
    full = [type(layer) is DynamicLayer for layer in shared.cache.layers]
    assert any(full) and all(full) == (family == "llama")
    before = [weakref.ref(layer.keys) for layer in shared.cache.layers]
    with shared.branch(), shared.branch():
        shared.extend(ids[:, PREFIX:])
        assert [ref() is None for ref in before] == full
    longer = [layer.keys.untyped_storage().nbytes() > layer.keys.nbytes for layer in shared.cache.layers]
    assert longer[full.index(True)]  # what the branch added is there until the next one
    shared.extend(ids[:, PREFIX : PREFIX + 1])
    keys = shared.cache.layers[full.index(True)].keys
    assert keys.untyped_storage().nbytes() == keys.nbytes


@pytest.mark.parametrize("fails", [False, True])
def test_several_rows_leave_the_single_one_and_none_of_their_memory(fails: bool) -> None:
    model = build("gemma3", "eager")
    ids, shared = tokens(1, LENGTH), grown(model, tokens(1, LENGTH))
    before, size = logits(model, shared, ids[:, PREFIX:]), shared.bytes
    sizes = [layer.keys.untyped_storage().nbytes() for layer in shared.cache.layers]
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext(), shared.branches(3):
        model(input_ids=ids[:, PREFIX:].expand(3, -1), **shared.forward_arguments())
        assert shared.bytes > 2 * size
        if fails:
            raise RuntimeError("stop")
    assert shared.bytes == size
    assert [layer.keys.untyped_storage().nbytes() for layer in shared.cache.layers] == sizes
    assert torch.equal(logits(model, shared, ids[:, PREFIX:]), before)


def test_a_branch_from_nothing_leaves_nothing() -> None:
    model = build("llama", "eager")
    ids, shared = tokens(1, LENGTH), PrefixCache(model)
    with shared.branch():
        shared.extend(ids)
    assert shared.bytes == shared.tokens == 0
    assert torch.equal(logits(model, shared, ids), model(input_ids=ids, use_cache=True).logits)


def test_a_pass_that_fails_between_layers_is_undone() -> None:
    model = build("llama", "eager")
    ids, shared = tokens(1, LENGTH), grown(model, tokens(1, LENGTH))
    before = logits(model, shared, ids[:, PREFIX:])
    update, calls = DynamicLayer.update, []

    def fail_late(
        layer: DynamicLayer, keys: torch.Tensor, *rest: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(layer)
        if len(calls) == 2:
            layer.keys = torch.cat([layer.keys, keys], dim=-2)  # as if there had been no room for the values
            raise torch.OutOfMemoryError("out of memory")
        return update(layer, keys, *rest, **named)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(torch.OutOfMemoryError), shared.branch():
        patched.setattr(DynamicLayer, "update", fail_late)
        shared.extend(ids[:, PREFIX:])
    assert torch.equal(logits(model, shared, ids[:, PREFIX:]), before)


def test_the_cache_is_found_by_its_type_not_by_its_name() -> None:
    assert cache_argument(build("llama")) in ("cache", "past_key_values")


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear takes no cache"):
        cache_argument(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["Bamba", "Jamba"])
def test_a_model_that_begins_anew_behind_its_cache_is_refused(name: str) -> None:
    model = further_families.build(name)
    with pytest.raises(UnsupportedModelError, match="does not continue from its cache"):
        PrefixCache(model)
