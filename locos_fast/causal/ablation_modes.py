"""What the modes of `ablate` put in the place of a head's output, or of its query."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.causal.calibration import Donors
from locos_fast.causal.intact import intact, unless_intact
from locos_fast.models.architecture import AttentionLayer, decoder, head_count
from locos_fast.models.forward_inputs import ForwardInputs, read_forward
from locos_fast.models.head_map import not_handed_over
from locos_fast.models.hidden_keys import HeadSets, check_rows
from locos_fast.models.query_channels import QueryProjection, query_projections

Replacement = Callable[[Tensor], Tensor]
"""What takes the place of a tensor (..., tokens, width): something that broadcasts to it."""


@contextlib.contextmanager
def replace_outputs(
    model: PreTrainedModel,
    layers: Mapping[int, AttentionLayer],
    heads: Mapping[int, HeadSets],
    replacement: Callable[[int], Replacement],
) -> Iterator[None]:
    """Heads hand `replacement(layer)` to their output projection: its input is what stands behind gates and norms."""
    with contextlib.ExitStack() as hooks:
        for number, sets in heads.items():
            hook = unless_intact(model, _output_hook(layers[number], sets, replacement(number)))
            hooks.callback(layers[number].projection.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def replace_queries(
    model: PreTrainedModel,
    layers: Mapping[int, AttentionLayer],
    heads: Mapping[int, HeadSets],
    replacement: Callable[[int], Replacement],
) -> Iterator[None]:
    """The query projection returns `replacement(layer)`, (width of the projection,) or less, in the channels of the
    heads. Raises UnsupportedModelError where these cannot be told apart."""
    with intact(model):
        found = query_projections(model, [layers[number] for number in heads])
    together = [number for number in heads if found[number].normed_together]
    if together:
        warnings.warn(
            f"layers {together} normalise the queries of all heads together: setting one rescales the others, as in "
            "the published procedure",
            stacklevel=4,
        )
    with contextlib.ExitStack() as hooks:
        for number, sets in heads.items():
            hook = unless_intact(model, _query_hook(found[number], sets, replacement(number)))
            hooks.callback(found[number].module.register_forward_hook(hook).remove)
        yield


def zero(x: Tensor) -> Tensor:
    """A `Replacement`."""
    return x.new_zeros(())


def constant(value: Tensor) -> Replacement:
    """(width,) for every token."""
    return lambda x: value.to(x)


@contextlib.contextmanager
def resampled(model: PreTrainedModel, donors: Donors, seed: int) -> Iterator[Callable[[int], Replacement]]:
    """Layer -> `Replacement`: at each slot of the sequence, what the layer's heads gave at one of the donors."""
    inputs = [ForwardInputs(None, 0, False)]

    def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[0] = read_forward(module, args, kwargs)

    def of_layer(number: int) -> Replacement:
        outputs = donors.outputs[number]

        def replacement(x: Tensor) -> Tensor:
            count = x.shape[-2]
            end = inputs[0].past + (count if inputs[0].tokens is None else inputs[0].tokens)
            drawn = donors.drawn(range(end - count, end), seed)
            return outputs[drawn.to(outputs.device)].to(x)

        return replacement

    hook = decoder(model).register_forward_pre_hook(before_forward, with_kwargs=True)
    try:
        yield of_layer
    finally:
        hook.remove()


def _output_hook(layer: AttentionLayer, sets: HeadSets, replacement: Replacement) -> Callable:
    heads = _table(sets, [[head] for head in range(head_count(layer))], head_count(layer))

    def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name, given = first_tensor(args, kwargs)
        if given.shape[-1] % heads.shape[1]:
            raise not_handed_over(layer)
        chosen = heads.repeat_interleave(given.shape[-1] // heads.shape[1], 1)
        changed = _replaced(given, chosen, replacement)
        return ((changed, *args[1:]), kwargs) if name is None else (args, kwargs | {name: changed})

    return pre_hook


def _query_hook(projection: QueryProjection, sets: HeadSets, replacement: Replacement) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _replaced(output, _table(sets, projection.channels, output.shape[-1]), replacement)

    return hook


def _table(sets: HeadSets, channels: list[list[int]], width: int) -> Tensor:
    """(B or 1, width) bool: the channels of each row's heads."""
    table = torch.zeros(len(sets), width, dtype=torch.bool)
    for row, heads in zip(table, sets, strict=True):
        row[[channel for head in heads for channel in channels[head]]] = True
    return table


def _replaced(x: Tensor, chosen: Tensor, replacement: Replacement) -> Tensor:
    """x (B, T, width), or (B * T, width) with the tokens of a row together; `chosen` (B or 1, width) bool."""
    chosen = chosen.to(x.device)
    if len(chosen) == 1:
        return torch.where(chosen[0], replacement(x), x)
    if x.ndim == 2 and len(x) % len(chosen) == 0:
        by_row = x.unflatten(0, (len(chosen), -1))
        return torch.where(chosen[:, None], replacement(by_row), by_row).flatten(0, 1)
    check_rows("heads", len(chosen), len(x))
    return torch.where(chosen[:, None], replacement(x), x)


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """What a projection is called with, and by what name, if by one."""
    if args:
        return None, args[0]
    return next((name, x) for name, x in kwargs.items() if isinstance(x, Tensor))
