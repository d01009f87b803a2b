"""What a forward was given is found by what it is: renaming an argument changes nothing, hiding a cache is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from locos_fast.models.architecture import decoder
from locos_fast.models.attention_registry import RecordingError
from locos_fast.models.forward_inputs import ForwardInputs, read_forward
from locos_fast.models.prefix_cache import cache_argument
from locos_fast.scoring.recording import record
from tests.oracles.cached_forward import forward_with_cache
from tests.oracles.tiny_models import build, tokens

PAST, NEW = 6, 5
IDS, EMBEDDINGS = torch.zeros(2, NEW, dtype=torch.int64), torch.zeros(2, NEW, 32)
MASK = torch.ones(2, PAST + NEW, dtype=torch.int64)  # also (B, n) of integers, and longer


def filled() -> Cache:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, PAST, 4), torch.zeros(2, 1, PAST, 4), 0)
    return cache


class Today(nn.Module):
    def forward(self, input_ids=None, attention_mask=None, cache=None, inputs_embeds=None):
        """The names of transformers 5.24."""


class Before(nn.Module):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None):
        """Those of 5.23 and earlier."""


class Unheard(nn.Module):
    def forward(self, words=None, seen=None, memory=None, vectors=None, **others):
        """Those of no release."""


class Loose(nn.Module):
    def forward(self, *args, **kwargs):
        """Names that the caller chooses."""


@pytest.mark.parametrize("module", [Today(), Before(), Unheard(), Loose()], ids=lambda module: type(module).__name__)
def test_arguments_by_position_are_told_apart_by_what_they_are(module: nn.Module) -> None:
    expected = ForwardInputs(tokens=NEW, past=PAST, cached=True)
    assert read_forward(module, (IDS, MASK, filled()), {}) == expected
    assert read_forward(module, (None, MASK, filled(), EMBEDDINGS), {}) == expected
    assert read_forward(module, (IDS, MASK), {}) == ForwardInputs(NEW, 0, False)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past", "anything"])
def test_a_cache_is_found_under_any_keyword(name: str) -> None:
    for module in (Unheard(), Loose()):
        assert read_forward(module, (IDS,), {name: filled()}) == ForwardInputs(NEW, PAST, True)


def test_an_empty_cache_is_a_cache_without_a_past() -> None:
    assert read_forward(Today(), (IDS,), {"cache": DynamicCache()}) == ForwardInputs(NEW, 0, True)


def test_keywords_in_any_order_are_read_in_the_order_of_the_signature() -> None:
    """A mask of integers looks like ids; every model takes its ids first."""
    assert read_forward(Today(), (), {"attention_mask": MASK, "input_ids": IDS}).tokens == NEW


def test_embeddings_count_before_any_mask() -> None:
    assert read_forward(Today(), (), {"attention_mask": MASK, "inputs_embeds": EMBEDDINGS}).tokens == NEW


def test_a_forward_without_ids_or_embeddings_has_no_token_count() -> None:
    assert read_forward(Loose(), (), {"image": torch.zeros(2, 3, 8, 8)}) == ForwardInputs(None, 0, False)


# --- in a recording

LENGTH, ROWS, SPANS = PAST + NEW, [7, 10], [(2, 5)]


def take_cache_as_memory(model: PreTrainedModel) -> None:
    """From now on the decoder is handed its cache as `memory`, a name of no release."""
    inner = decoder(model)
    own, plain = cache_argument(inner), inner.forward

    def rename(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        return args, {"memory" if name == own else name: value for name, value in kwargs.items()}

    inner.register_forward_pre_hook(rename, with_kwargs=True)
    inner.forward = lambda *args, memory=None, **kwargs: plain(*args, **{own: memory}, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_renamed_cache_is_recorded_as_before(family: str) -> None:
    ids, recordings = tokens(1, LENGTH), []
    for renamed in (False, True):
        model = build(family, "sdpa")
        if renamed:
            take_cache_as_memory(model)
        cache = DynamicCache(config=model.config)
        with record(model, ROWS, SPANS, verify=True) as kept:
            for chunk in ids.split((PAST, NEW), dim=1):
                forward_with_cache(model, chunk, cache=cache)
        recordings.append(kept)
    for layer, expected in recordings[0].items():
        assert all(map(torch.equal, recordings[1][layer], expected))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_of_a_past_that_the_decoder_was_not_handed_are_an_error(attention: str) -> None:
    model, ids = build("llama", attention), tokens(1, LENGTH)
    cache = DynamicCache(config=model.config)
    forward_with_cache(model, ids[:, :PAST], cache=cache)

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """After the recorder looked at the arguments: as if the model kept its past where nobody sees it."""
        return args, kwargs | {cache_argument(module): cache}

    unplaced = rf"attends to {LENGTH} keys in a forward of {NEW} tokens, and no transformers.Cache was found"
    with pytest.raises(RecordingError, match=unplaced), record(model, ROWS, SPANS):
        decoder(model).register_forward_pre_hook(remember, with_kwargs=True)
        model(ids[:, PAST:])
