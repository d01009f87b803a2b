"""How much memory one scoring forward takes, so that a run which cannot fit is refused before it starts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from locos_fast.models.cache_memory import CachedLayer, Way, cache_bytes, cached_layers, largest_cache, without_memory
from locos_fast.models.foreign_errors import one_value_error
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK

GIB = 2**30


class MemoryEstimate(NamedTuple):
    """Bytes, at the peak of one forward pass over one prompt."""

    weights: int
    activations: int  # one layer's, and the residual stream
    attention: int  # score matrices and masks that the attention implementation builds
    sums: int = 0  # of an attribution, over its segments
    cache: int = 0  # keys and values of shared beginnings or of a reply, in all copies that are held at once

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self._asdict().items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


class Segments(NamedTuple):
    """How much an attribution sums."""

    segments: int
    rows: int  # answer tokens

    def bytes(self, config: Any) -> int:
        """What one layer's sums take while they are added up and put in order, and those of all layers."""
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None) or 1
        in_one_layer = 6 * heads * self.rows * self.segments  # sums of phi and alpha, their parts per tile, in order
        return 4 * (in_one_layer + text.num_hidden_layers * heads * self.segments)


def estimate(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    attn_implementation: str | None,
    summed: Segments | None = None,
    cached: Iterable[Way] = (),
) -> MemoryEstimate:
    """Estimate a forward over `tokens` tokens; `config` is the model's configuration.

    summed: of an attribution. cached: of trials that continue from a cache, be it a shared beginning or their own, how
    far it reaches after every pass on the way to them (`prompts.prefix_tree.passes`); the largest counts. That a pass
    holds one layer's keys or values before and after it is within `activations`, which are those of all tokens at once.
    Raises ValueError, in one line, for a configuration from which no model can be built.
    """
    with one_value_error("model: config.json describes no model that can be built"):
        weights = _parameters(config) * dtype.itemsize
        activations, attention = _above_weights(config, tokens, dtype, attn_implementation)
        sums = 0 if summed is None else summed.bytes(config)
        ways = {way for way in cached if way.ends}
        layers = cached_layers(config) if ways else []
    return MemoryEstimate(weights, activations, attention, sums, largest_cache(layers, ways, dtype))


def available(device: torch.device) -> int:
    """Free bytes on a device: GPU memory, or the machine's memory that can be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    import psutil  # type: ignore[import-untyped]

    return psutil.virtual_memory().available


class WithCache(NamedTuple):
    """Whether trials may continue from shared beginnings on a device."""

    fits: bool
    needed: MemoryEstimate
    free: int  # bytes

    def __str__(self) -> str:
        return (
            f"memory: with the beginnings that prompts share kept, this run needs about {self.needed} and "
            f"{self.free / GIB:.2f} GiB are free; so nothing is shared, and each trial is run on its own"
        )


def fits_with_cache(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    attn_implementation: str | None,
    device: torch.device,
    cached: Iterable[Way],
) -> WithCache:
    """Whether forwards over at most `tokens` tokens fit together with the caches of shared beginnings, see `estimate`.

    To be asked before the weights are loaded. A run for which it says no may still fit without them: that is what
    `refuse_if_too_large` says.
    """
    needed, free = estimate(config, tokens, dtype, attn_implementation, cached=cached), available(device)
    return WithCache(needed.total <= free, needed, free)


def refuse_if_too_large(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    attn_implementation: str | None,
    device: torch.device,
    summed: Segments | None = None,
    *,
    generating: bool = False,
) -> MemoryEstimate:
    """The estimate of a forward over `tokens` tokens; generating: with keys and values of all of them kept.

    Raises ValueError if it exceeds the free memory, naming what is needed, what there is and how many tokens would fit.
    """
    own = [Way((tokens,))] if generating else []
    needed, free = estimate(config, tokens, dtype, attn_implementation, summed, own), available(device)
    if needed.total <= free:
        return needed
    layers = cached_layers(config) if generating else []
    most = tokens_that_fit(config, tokens, dtype, attn_implementation, free - needed.weights - needed.sums, layers)
    fits = f"about {most} tokens would fit" if most else "not even the weights and one token fit"
    raise ValueError(
        f"memory: this run needs about {needed} and {device} has {free / GIB:.2f} GiB free; {fits}; use a shorter "
        "context, a smaller dtype, or an attention implementation that builds no score matrix"
    )


def tokens_that_fit(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    attn_implementation: str | None,
    room: int,
    cached: Sequence[CachedLayer] = (),
) -> int:
    """The most tokens, at most `tokens`, whose forward takes no more than `room` bytes above the weights; 0 if none.

    cached: layers that keep the keys and values of all of them.
    """

    def above_weights(n: int) -> int:
        return sum(_above_weights(config, n, dtype, attn_implementation)) + cache_bytes(cached, Way((n,)), dtype)

    return bisect_right(range(1, tokens + 1), room, key=above_weights)


def _above_weights(config: Any, tokens: int, dtype: torch.dtype, attn_implementation: str | None) -> tuple[int, int]:
    """Bytes of activations and of what attention builds; both grow with the tokens."""
    text = config.get_text_config(decoder=True)
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    implementation = attn_implementation or "sdpa"
    activations = max(_activations(layer, tokens) for layer in layers) * dtype.itemsize
    return activations, max(_attention_bytes(layer, tokens, dtype.itemsize, implementation) for layer in layers)


def _parameters(config: Any) -> int:
    return sum(parameter.numel() for parameter in without_memory(config).parameters())


def _activations(layer: Any, tokens: int) -> int:
    """Numbers that one layer holds at its widest moment; its MLP works on a chunk of the tokens at a time."""
    hidden = layer.hidden_size
    heads = getattr(layer, "num_attention_heads", None) or 1  # state-space models have none; loading refuses them
    head_dim = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None) or hidden // heads
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    intermediate = getattr(layer, "intermediate_size", None) or getattr(layer, "n_inner", None) or 4 * hidden
    attention_block = tokens * (3 * hidden + 2 * (heads + kv_heads) * head_dim * 2)
    mlp_block = tokens * 3 * hidden + min(tokens, TOKENS_PER_CHUNK) * 3 * intermediate
    return max(attention_block, mlp_block)


def _attention_bytes(text: Any, tokens: int, itemsize: int, implementation: str) -> int:
    if implementation == "eager":  # scores, softmax in float32 and its cast, for all heads at once; and the mask
        return tokens * tokens * (text.num_attention_heads * (2 * itemsize + 4) + itemsize)
    windowed = any("full" not in kind for kind in getattr(text, "layer_types", None) or [])
    windowed = windowed or getattr(text, "sliding_window", None) is not None
    return tokens * tokens if windowed and implementation == "sdpa" else 0  # a bool mask, tokens x tokens
