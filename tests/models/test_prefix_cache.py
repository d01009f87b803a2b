"""A shared beginning: what continues from it computes what the whole prompt does, and leaves no trace."""

import pytest
import torch
from torch import nn

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
