"""How many tokens a forward pass of a decoder is given, and how many its cache holds already.

Both are found by what they are, never by the name of the argument: transformers 5.24 renamed `past_key_values` to
`cache` in every model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Cache


class ForwardInputs(NamedTuple):
    """What a decoder was called with, as far as positions depend on it."""

    tokens: int | None  # of each sequence, in this forward; None where neither ids nor embeddings were found
    past: int  # tokens in the cache
    cached: bool  # whether there is a cache


def read_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ForwardInputs:
    """Tokens are counted in the embeddings, (B, tokens, hidden) floating, or else in the ids: the first argument, in
    the order of the module's signature, that is (B, tokens) of integers."""
    given = list(_arguments(module, args, kwargs))
    cache = next((x for x in given if isinstance(x, Cache)), None)
    counted = next(filter(_is_embeddings, given), None)
    counted = _ids(given) if counted is None else counted
    past = 0 if cache is None else int(cache.get_seq_length())
    return ForwardInputs(None if counted is None else counted.shape[1], past, cache is not None)


def read_ids(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids, (B, tokens), that a decoder was called with; None where it was given embeddings."""
    given = list(_arguments(module, args, kwargs))
    return None if any(map(_is_embeddings, given)) else _ids(given)


def _is_embeddings(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point()


def _ids(given: Iterable[Any]) -> Tensor | None:
    return next((x for x in given if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()), None)


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
    signature = inspect.signature(module.forward)
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.values()
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            yield from value
        else:
            yield value
