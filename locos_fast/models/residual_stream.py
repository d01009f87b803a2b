"""Follow the residual stream through one forward pass, at the answer rows only.

`trace` puts hooks on the decoder's layers, on their direct children and on the unembedding, keeps the answer rows of
what goes in and comes out, and takes the hooks off again. From that, `attention_path` finds out how a layer's attention
output reaches the stream: through a norm of its own, times a multiplier, before or beside the rest of the layer.
Nothing is known by model name; a layer whose path cannot be followed is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.architecture import (
    AttentionLayer,
    UnsupportedModelError,
    attention_layers,
    decoder,
    decoder_layers,
    unembedding,
)
from locos_fast.models.cost import Stopwatch, timed
from locos_fast.models.norms import FrozenNorm, freeze

SLACK = 4  # rounding errors of the model's dtype that a sum in the stream may differ by


class Passage(NamedTuple):
    """One call of a module, (T, width) at the answer rows."""

    module: nn.Module
    inputs: Tensor
    outputs: Tensor


class LayerTrace(NamedTuple):
    """What one decoder layer did at the answer rows."""

    module: nn.Module
    inputs: Tensor  # (T, hidden) residual stream in front of the layer
    outputs: Tensor  # (T, hidden) and behind it
    children: list[Passage]  # calls of its direct children, in order


class StreamTrace:
    """The residual stream of one forward pass, at the answer rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers: dict[int, LayerTrace] = {}  # layer number -> what it did
        self.projected: dict[int, Passage] = {}  # attention layer number -> its output projection
        self.final: list[Passage] = []  # calls of the decoder's own children, layers left out
        self.unembedding: Passage | None = None

    def final_norm(self) -> Passage | None:
        """The call that made the unembedding's input; None if the last layer's output went there as it was."""
        assert self.unembedding is not None
        for passage in reversed(self.final):
            if _same(passage.outputs, self.unembedding.inputs):
                return passage
        return None


@contextlib.contextmanager
def trace_projections(
    model: PreTrainedModel, rows: Sequence[int], watch: Stopwatch | None = None
) -> Iterator[StreamTrace]:
    """`trace`, but only of what goes into and comes out of the attention layers' output projections."""
    result = StreamTrace(model)
    tracer = _Tracer(result, list(rows), watch)
    with contextlib.ExitStack() as hooks:
        for hook in tracer.projection_hooks(model):
            hooks.callback(hook.remove)
        yield result


@contextlib.contextmanager
def trace(model: PreTrainedModel, rows: Sequence[int], watch: Stopwatch | None = None) -> Iterator[StreamTrace]:
    """Keep the residual stream at `rows` of the one forward pass inside the context.

    rows: increasing token indices. The pass must be a single prefill of one prompt without a cache, with logits for all
    tokens, for `rows` only, or, if it ends at the last row, for the last tokens. watch: adds up the time that keeping
    them takes.
    """
    result = StreamTrace(model)
    tracer = _Tracer(result, list(rows), watch)
    with contextlib.ExitStack() as hooks:
        for hook in tracer.hooks(model):
            hooks.callback(hook.remove)
        yield result


class _Tracer:
    """The hooks of one trace."""

    def __init__(self, result: StreamTrace, rows: list[int], watch: Stopwatch | None) -> None:
        self.result, self.rows, self.watch = result, rows, watch
        self.children: dict[int, list[Passage]] = {}

    def hooks(self, model: PreTrainedModel) -> Iterator[Any]:
        stack = decoder(model)
        for number, layer in enumerate(decoder_layers(model)):
            for child in layer.children():
                yield child.register_forward_hook(self._into(self.children.setdefault(number, [])), with_kwargs=True)
            yield layer.register_forward_hook(self._layer(number), with_kwargs=True)
        for child in stack.children():
            if not isinstance(child, nn.ModuleList):
                yield child.register_forward_hook(self._into(self.result.final), with_kwargs=True)
        yield from self.projection_hooks(model)
        yield unembedding(model).register_forward_hook(self._unembedding, with_kwargs=True)

    def projection_hooks(self, model: PreTrainedModel) -> Iterator[Any]:
        for attention in attention_layers(model):
            yield attention.projection.register_forward_hook(self._projection(attention.number), with_kwargs=True)

    def _passage(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Passage | None:
        given = args[0] if args else next((x for x in kwargs.values() if isinstance(x, Tensor)), None)
        with timed(self.watch, given.device if isinstance(given, Tensor) else torch.device("cpu")):
            inputs, outputs = take_rows(given, self.rows), take_rows(output, self.rows)
        return None if inputs is None or outputs is None else Passage(module, inputs, outputs)

    def _into(self, calls: list[Passage]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            passage = self._passage(module, args, kwargs, output)
            if passage is not None:
                calls.append(passage)

        return hook

    def _layer(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            passage = self._passage(module, args, kwargs, output)
            if passage is not None:
                self.result.layers[number] = LayerTrace(*passage, self.children.get(number, []))

        return hook

    def _projection(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            passage = self._passage(module, args, kwargs, output)
            if passage is not None:
                self.result.projected[number] = passage

        return hook

    def _unembedding(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.result.unembedding = self._passage(module, args, kwargs, output)


def take_rows(x: Any, rows: list[int]) -> Tensor | None:
    """(T, width) of the tokens `rows`, increasing, of what a module was given or returned; None if it is no such
    thing."""
    x = x[0] if isinstance(x, tuple) else x
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        return None
    flat = x.detach().reshape(-1, x.shape[-1])
    if len(flat) == len(rows):  # given these rows only, or there are no others: rows are sorted
        return flat.clone()
    skipped = max(0, rows[-1] + 1 - len(flat))  # given the last tokens only, of a pass that ends at the last row
    first, last = rows[0] - skipped, rows[-1] + 1 - skipped
    if first < 0:
        return None
    if last - first == len(rows):  # consecutive, the usual case: an index from the host would wait for the device
        return flat[first:last].clone()
    return flat[[row - skipped for row in rows]]


class AttentionPath(NamedTuple):
    """How one layer's attention output reaches the residual stream: stream += multiplier * norm(output)."""

    norm: FrozenNorm | None
    multiplier: float
    write: Tensor  # (T, hidden) what the stream received, measured as a difference in the stream where that is possible
    layer_scale: float  # the whole stream is multiplied by this at the end of the layer


def attention_path(layer: LayerTrace, attention: AttentionLayer, projected: Passage) -> AttentionPath:
    """Follow what a layer's attention projected (`projected`) into the stream.

    Raises UnsupportedModelError, naming the layer, if what the stream received is not a multiple of that output.
    """
    at, output = _attention_call(layer, attention)
    added = output.to(_dtype(output))
    if not _close(projected.outputs.to(added), added, added, output.dtype):
        raise UnsupportedModelError(
            f"layer {attention.number}: the output of {type(attention.module).__name__} is not what its "
            f"{type(projected.module).__name__} returned, and cannot be followed back to its heads"
        )
    taken_in = (call for call in layer.children[at + 1 :] if _same(call.inputs, output))
    norm_call = next((call for call in taken_in if not _same(call.outputs, output)), None)  # not a dropout at rest
    norm = None
    if norm_call is not None:
        norm, added = freeze(norm_call.module, norm_call.inputs, norm_call.outputs), norm_call.outputs.to(added)
    scale = float(getattr(layer.module, "layer_scalar", 1.0))
    # every sum that should be there is there only up to rounding, which may be much of a small write: take the best
    multiplier, write = min(
        _candidates(layer, at, added, scale), key=lambda candidate: float((candidate[1] - candidate[0] * added).norm())
    )
    if not _close(write, multiplier * added, layer.inputs.to(added), output.dtype):
        raise UnsupportedModelError(
            f"layer {attention.number} ({type(layer.module).__name__}): cannot follow the output of "
            f"{type(attention.module).__name__} into the residual stream"
        )
    return AttentionPath(norm, multiplier, write, scale)


def _candidates(layer: LayerTrace, at: int, added: Tensor, scale: float) -> Iterator[tuple[float, Tensor]]:
    """Multipliers, and what the stream received if the layer used them."""
    start = layer.inputs.to(added)
    whole = layer.outputs.to(added) / scale - start
    yield 1.0, whole  # nothing else in this layer
    # sequential layers: something after the attention (the next norm) takes in the stream with the attention's write
    for call in layer.children[at + 1 :]:
        if call.inputs.shape == start.shape:
            for multiplier in _multipliers(layer.module):
                yield multiplier, call.inputs.to(added) - start
    # parallel layers: the stream receives the attention and another block's output at once
    for call in layer.children:
        if call.outputs.shape == start.shape:
            yield 1.0, whole - call.outputs.to(added)


def check_stream_passes(number: int, layer: LayerTrace, write: Tensor, scale: float) -> Tensor:
    """What other blocks of a layer wrote, (T, hidden): `outputs / scale - inputs - write`.

    Raises UnsupportedModelError, naming the layer, unless that is a sum of what the layer's children returned; it is
    not where the layer rescales or normalises the stream itself, which directions from behind it would not survive.
    """
    inputs = layer.inputs.to(write)
    rest = layer.outputs.to(write) / scale - inputs - write
    parts = [
        call.outputs for call in layer.children if call.outputs.shape == rest.shape and not _passed_on(call, layer)
    ]
    few = slice(8)  # rows are evidence enough
    target = rest[few].double().cpu().reshape(-1, 1)
    blocks = torch.stack([part[few].double().cpu().flatten() for part in parts or [rest.new_zeros(rest.shape)]], dim=1)
    fitted = blocks @ torch.linalg.lstsq(blocks, target, driver="gelsd").solution
    coarse = max(layer.outputs.dtype, torch.float32, key=lambda dtype: torch.finfo(dtype).eps)  # a fit is not exact
    if not _close(target, fitted, inputs[few].double().cpu(), coarse):
        raise UnsupportedModelError(
            f"layer {number} ({type(layer.module).__name__}) changes the residual stream in a way that cannot be "
            "followed: it does more than add what its parts return"
        )
    return rest


def _passed_on(call: Passage, layer: LayerTrace) -> bool:
    """Another child takes in what this one returned, as attention does of the norm before it."""
    return any(other is not call and _same(other.inputs, call.outputs) for other in layer.children)


def _attention_call(layer: LayerTrace, attention: AttentionLayer) -> tuple[int, Tensor]:
    for at, call in enumerate(layer.children):
        if any(module is attention.module for module in call.module.modules()):
            return at, call.outputs
    raise UnsupportedModelError(f"layer {attention.number} does not call its {type(attention.module).__name__}")


def _multipliers(layer: nn.Module) -> list[float]:
    """Factors a layer may put in front of what it adds to the stream, by the names in use."""
    declared = getattr(layer, "residual_multiplier", None)
    return [1.0] if declared is None else [float(declared), 1.0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _close(a: Tensor, b: Tensor, size: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of a sum with `size` in `dtype`."""
    allowed = SLACK * torch.finfo(dtype).eps * (size.norm() + b.norm())
    return bool((a - b).norm() <= allowed) and bool(b.norm() > allowed or a.norm() <= allowed)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
