"""How much memory the keys and values of shared beginnings take, found out without any.

What a layer's cache keeps differs between models and between releases of transformers: heads or a latent, all tokens or
a window of them, nothing where layers share. So a model without memory, on the meta device, is given some tokens, and
what it has put into its cache is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.prefix_cache import PrefixCache, is_cropped

FEWER, MORE = 2, 3  # tokens: what the cache grows by between the two
DTYPE = torch.bfloat16  # of the model without memory: the one in which experts, too, multiply there
STATE_BYTES = 4  # transformers keeps the states of linear attention in float32


class Way(NamedTuple):
    """The passes that lead to one trial's keys and values."""

    ends: tuple[int, ...]  # tokens that are there after each of them, increasing, the trial's own last; none: no cache
    rows: int = 1  # trials at most that the last pass runs side by side, each with a copy of what is there before it
    copied: int = 0  # bytes at most that those copies take; trials for which there is no room run alone


class CachedLayer(NamedTuple):
    """What a cache keeps of one layer, in numbers."""

    per_token: int  # keys and values
    window: int | None  # tokens that a sliding or chunked layer sees; all but one of them are there for the next pass
    states: int = 0  # what does not grow with the tokens: of linear attention and convolutions
    cropped: bool = False  # whether it is put back by cutting it, see `prefix_cache`

    def seen(self, tokens: int) -> int:
        """Tokens whose keys and values the next pass is given, `tokens` being there."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def bytes(self, ends: Sequence[int], itemsize: int, rows: int = 1) -> int:
        """Of all copies on the way to one trial, or to `rows` of them side by side, see `cache_bytes`.

        What a layer with a window keeps is a view of everything that a pass has put together: the window before it, and
        all of the pass's own tokens. None of that is free until the view is gone.
        """
        starts = [0, *ends[:-1]]
        sizes = [self.seen(start) + end - start for start, end in zip(starts, ends, strict=True)]
        before = starts[-1] if self.cropped else sum(sizes[:-1])
        tokens = rows * sizes[-1] + (0 if self.cropped and rows == 1 else before)
        return tokens * self.per_token * itemsize + len(ends) * self.states * max(itemsize, STATE_BYTES)


def cache_bytes(layers: Sequence[CachedLayer], way: Way, dtype: torch.dtype) -> int:
    """Bytes held at once when the cache was extended along `way`, one pass after another; none where that is empty.

    Every pass puts keys and values together anew. Those before it are kept to be put back where a layer is not cropped,
    and where the last pass is of several rows; else they are gone, a layer's as soon as the pass is behind it.
    """
    return largest_cache(layers, [way], dtype)


def largest_cache(layers: Sequence[CachedLayer], ways: Iterable[Way], dtype: torch.dtype) -> int:
    """Bytes held at most while trials are walked to, one after the other: each layer's at its own largest, because what
    a cropped one was continued with stays until it is continued again, and layers are continued one by one."""
    walked = [(way.ends, _side_by_side(layers, way, dtype)) for way in ways if way.ends]
    return sum(max((layer.bytes(ends, dtype.itemsize, rows) for ends, rows in walked), default=0) for layer in layers)


def _side_by_side(layers: Sequence[CachedLayer], way: Way, dtype: torch.dtype) -> int:
    """Trials that the last pass of a way runs; states do not serve several (`PrefixCache.serves_several`)."""
    before = way.ends[-2] if way.ends[1:] else 0
    one = sum(layer.seen(before) * layer.per_token for layer in layers) * dtype.itemsize
    return 1 if any(layer.states for layer in layers) else max(1, min(way.rows, way.copied // max(one, 1)))


def cached_layers(config: Any) -> list[CachedLayer]:
    """What the cache of a model of this configuration keeps of each layer; none for a model whose beginnings cannot be
    shared (`PrefixCache`)."""
    model = without_memory(config, DTYPE).eval()
    try:
        fewer, more = PrefixCache(model), PrefixCache(model)
    except UnsupportedModelError:
        return []
    try:
        with torch.inference_mode(), torch.device("meta"):
            for prefix, tokens in ((fewer, FEWER), (more, MORE)):
                model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), **prefix.forward_arguments())
    except Exception:  # another library's code on tensors without values: a model that looks at them fails somehow
        return _declared_layers(config, more.cache)
    return [_layer(*both) for both in zip(fewer.cache.layers, more.cache.layers, strict=True)]


def without_memory(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of this configuration on the meta device."""
    # code was run already where the configuration's class is not transformers' own; never left open: it would ask
    trusted = not type(config).__module__.startswith("transformers.")
    with torch.device("meta"):
        given = {} if dtype is None else {"dtype": dtype}  # else that of the configuration, which may be none
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, **given)


def _layer(fewer: Any, more: Any) -> CachedLayer:
    """From what a layer's cache holds after FEWER and after MORE tokens."""
    few, many = (sum(_numbers(vars(layer))) for layer in (fewer, more))
    per_token = (many - few) // (MORE - FEWER)
    return CachedLayer(per_token, _window(more), many - MORE * per_token, is_cropped(more))


def _numbers(held: Any) -> Iterator[int]:
    """How many numbers each tensor keeps in memory, whatever part of it is looked at."""
    if isinstance(held, Tensor) and held.is_floating_point():
        yield held.untyped_storage().nbytes() // held.element_size()
    elif isinstance(held, dict | list):
        for inner in held.values() if isinstance(held, dict) else held:
            yield from _numbers(inner)


def _window(layer: Any) -> int | None:
    return getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None


def _declared_layers(config: Any, cache: DynamicCache) -> list[CachedLayer]:
    """As the configuration's numbers of heads have it, for a model that cannot be asked."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return [CachedLayer(2 * kv_heads * head_dim, _window(layer), cropped=is_cropped(layer)) for layer in cache.layers]
