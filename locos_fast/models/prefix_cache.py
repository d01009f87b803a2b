"""A KV cache that several continuations of one prompt start from, each finding it as the prompt left it.

A layer of full attention is cropped: before a continuation only its length is noted, and after it keys and values are
cut to that length. A continuation concatenates, so that the new tensors, which hold the old tokens too, are the only
ones there. The cut is a view: the longer tensors stay in memory until the next continuation has replaced them. What
other layers hold is remembered and set again: keys and values of a window, which are never written in place, without a
copy, and the few states of layers that work otherwise (windows' counters, linear attention) in one.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from locos_fast.models.architecture import UnsupportedModelError

LENGTH_DEPENDENT = ("dynamic", "longrope")  # of transformers' ROPE_INIT_FUNCTIONS
PROBE_TOKENS = 12
SLACK, SLACK_FULL = {torch.float16: 0.2, torch.bfloat16: 0.2}, 1e-2  # of the logits; what it catches is off by half

_continues: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that hold nothing else
REPLACED = ("keys", "values")  # by a new tensor, in every update of a DynamicLayer


class PrefixCache:
    """The cache of one prompt's beginning: `extend` it, `branch` from it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModelError for a model that takes no cache, or whose keys depend on what follows them."""
        check_keys_stay(model)
        check_continues(model)
        self.model = model
        self.cache = empty_cache(model)
        self.argument = cache_argument(model)
        self.ids: list[int] = []  # of the prompt's tokens whose keys and values are there

    @property
    def tokens(self) -> int:
        """Tokens of the prompt whose keys and values are there."""
        return len(self.ids)

    def check_continued_by(self, input_ids: Tensor, rows: Sequence[int]) -> None:
        """Raises ValueError unless (1, N) `input_ids` begin with these tokens and all `rows` lie behind them."""
        if input_ids[0, : self.tokens].tolist() != self.ids:
            raise ValueError(f"prefix: expected the first {self.tokens} tokens of input_ids, got others")
        if min(rows) < self.tokens:
            raise ValueError(f"prefix: expected fewer tokens than the first answer row, {min(rows)}, got {self.tokens}")

    def forward_arguments(self) -> dict[str, Any]:
        """What a forward is given so that it continues from here."""
        return {self.argument: self.cache, "use_cache": True}

    @torch.inference_mode()
    def extend(self, input_ids: Tensor) -> None:
        """Compute further tokens, (1, n) int64, of the prompt."""
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        self.model(input_ids=input_ids, **self.forward_arguments(), **last)
        self.ids += input_ids[0].tolist()

    @property
    def serves_several(self) -> bool:
        """Whether several continuations may run side by side, a batch row each: if the layers hold keys and values
        alone, or nothing because another layer does it for them. The states of linear attention and of convolutions are
        written in place, and some models restart them."""
        return all(
            type(layer) in KEYS_AND_VALUES or not any(isinstance(x, Tensor | dict) for x in vars(layer).values())
            for layer in self.cache.layers
        )

    @property
    def bytes(self) -> int:
        """Of the keys and values that are there."""
        kept = [getattr(layer, name, None) for layer in self.cache.layers for name in REPLACED]
        return sum(x.nbytes for x in kept if isinstance(x, Tensor))

    @contextlib.contextmanager
    def branches(self, count: int) -> Iterator[None]:
        """`branch` for that many continuations in one forward pass, where the cache `serves_several`.

        Nothing is copied here: keys and values are never written in place, so that all rows may read the same; but the
        pass itself puts each row's own behind a copy of them, `count` times the cache in all, while the one that is put
        back is kept: cut out of the rows it would keep all of them in memory.
        """
        with self.branch():
            single = [
                (layer, layer.keys, layer.values)
                for layer in self.cache.layers
                if isinstance(layer, DynamicLayer) and layer.get_seq_length()
            ]
            try:
                for layer, keys, values in single:
                    layer.keys, layer.values = (x.expand(count, -1, -1, -1) for x in (keys, values))
                yield
            finally:
                for layer, keys, values in single:
                    layer.keys, layer.values = keys, values

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Inside the context the cache may be continued; on exit it is as it was, also after an exception.

        Of full layers no second copy is kept, however deep branches lie in each other; after the exit what a branch has
        added stays in memory, unseen, until the next continuation.
        """
        layers, ids = list(self.cache.layers), list(self.ids)
        noted = [_Noted.of(layer) for layer in layers]
        try:
            yield
        finally:
            self.ids, self.cache.layers[:] = ids, layers  # without those that a continuation added
            for layer, held in zip(layers, noted, strict=True):
                held.put_back(layer)


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """As the model's own configuration wants it: windows, linear attention and all."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def check_continues(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that, given several tokens behind a cache, does not go on as if it had
    been given all of them at once: state-space layers of some models begin anew.

    Shown once a model, on a few random tokens; a model without weights, on the meta device, shows nothing.
    """
    if model not in _continues:
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            return
        _continues[model] = _shows_to_continue(model)
    if not _continues[model]:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not continue from its cache as it would without: a beginning cannot be "
            "shared between prompts"
        )


@torch.inference_mode()
def _shows_to_continue(model: PreTrainedModel) -> bool:
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(table), (1, 2 * PROBE_TOKENS), generator=generator).to(table.device)
    cache = {cache_argument(model): empty_cache(model), "use_cache": True}
    model(input_ids=ids[:, :PROBE_TOKENS], **cache)
    behind = model(input_ids=ids[:, PROBE_TOKENS:], **cache).logits[0, -1].double()
    whole = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    return bool((behind - whole).norm() <= SLACK.get(model.dtype, SLACK_FULL) * whole.norm())


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model's forward takes its cache: of the argument whose type is a transformers.Cache."""
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.annotation is Cache or "Cache" in str(parameter.annotation):
            return name
    raise UnsupportedModelError(f"{type(model).__name__} takes no cache: a beginning cannot be shared between prompts")


def check_keys_stay(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for rotary embeddings that choose their frequencies by the length of a forward pass:
    a beginning computed alone has other keys than within the whole prompt."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in LENGTH_DEPENDENT:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has rotary embeddings of type {kind!r}, which depend on the length of "
                    "the prompt: a beginning cannot be shared between prompts"
                )


def is_cropped(layer: Any) -> bool:
    """Whether a layer of a cache is put back by cutting it to its length: one that only ever grows at its end."""
    return type(layer) is DynamicLayer


class _Noted(NamedTuple):
    """What a layer of the cache is to be put back to."""

    lengths: dict[str, int]  # of what is cropped, in tokens
    state: dict[str, Any]  # the rest

    @classmethod
    def of(cls, layer: Any) -> _Noted:
        held = {name: vars(layer)[name] for name in REPLACED} if isinstance(layer, DynamicLayer) else {}
        cropped = {name: x.shape[-2] for name, x in held.items() if is_cropped(layer) and x is not None and x.ndim > 1}
        rest = {name: value for name, value in vars(layer).items() if name not in cropped}
        return cls(cropped, {name: value if name in held else _copied(value) for name, value in rest.items()})

    def put_back(self, layer: Any) -> None:
        grown = {name: vars(layer)[name] for name in self.lengths}
        assert all(x.shape[-2] >= self.lengths[name] for name, x in grown.items()), "a continuation took tokens away"
        vars(layer).clear()
        vars(layer).update(self.state | {name: _cut(x, self.lengths[name]) for name, x in grown.items()})


def _cut(x: Tensor, length: int) -> Tensor:
    return x if x.shape[-2] == length else x[..., :length, :]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
