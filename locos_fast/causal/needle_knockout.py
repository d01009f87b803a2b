"""Heads that may not see the needle, with whatever attention implementation the model uses.

No implementation takes a mask per head. So the model attends as ever, and the heads that shall not see the needle are
computed again, for the rows that would see some of it, from the call's own queries, keys and values: in
`ops.attention_summary` the needle's keys are holes, its one span is everything, and the output of that span is the
softmax over the keys that are left, summed in float32 at least. The same number is (output - needle part) / (1 - mass
of the needle), one read of the values cheaper; but where a head looks at little else, as retrieval heads do, that is a
small difference of large numbers, and in half precision noise.

Rows that see nothing of the needle, and heads that may see it, keep what the model computed, bit for bit. A row that
sees nothing but the needle gives zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast import ops
from locos_fast.causal.intact import unless_intact
from locos_fast.models.architecture import AttentionLayer, decoder
from locos_fast.models.attention_calls import (
    end_of_call,
    mask_reference,
    masking_arguments,
    refuse_call,
    several_calls,
    softmax_arguments,
)
from locos_fast.models.attention_registry import InterfaceCall, RecordingError, registry
from locos_fast.models.forward_inputs import ForwardInputs, read_forward
from locos_fast.models.hidden_keys import HeadSets, HeadsPart, HiddenKeys, heads_parts, hidden_columns
from locos_fast.models.mask_reading import Call, RowsSeen, read_visibility
from locos_fast.ops.exact import exact, multiplied_as
from locos_fast.ops.visibility import Visibility, count_span_visible

ROWS_AT_ONCE = 4096  # queries; scores are as wide as a block of keys
MASK_AT_ONCE = 2**25  # elements of a mask that are read at once
FEW_ROWS, KEYS_PER_PROGRAM = 64, 2048  # on a GPU, which works on spans side by side, on the keys of one in turn


@contextlib.contextmanager
def hide_needle(
    model: PreTrainedModel, layers: Mapping[int, AttentionLayer], heads: Mapping[int, HeadSets], spans: Tensor
) -> Iterator[None]:
    """Hide the keys in `spans`, (B or 1, S, 2) slots, from `heads`, layer number -> sets, while the model runs inside.

    Contexts of one model may be nested: what several hide from a head is hidden together. No gradients flow through
    the heads that are computed again. Raises RecordingError if a layer attends in a forward pass without being seen.
    """
    knockout = _Knockout({number: layers[number] for number in heads}, heads, spans)
    stack = decoder(model)
    hooks = [
        stack.register_forward_pre_hook(knockout.before_forward, with_kwargs=True),
        stack.register_forward_hook(unless_intact(model, knockout.check_complete)),
        stack.register_forward_hook(knockout.clear, always_call=True),
    ]
    try:
        with registry.intervene((layer.module for layer in knockout.layers.values()), knockout):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Knockout:
    """An `attention_registry.Intervention`."""

    def __init__(self, layers: dict[int, AttentionLayer], heads: Mapping[int, HeadSets], spans: Tensor) -> None:
        self.layers = {id(layer.module): layer for layer in layers.values()}
        self.hidden = {id(layers[number].module): HiddenKeys(spans, sets) for number, sets in heads.items()}
        self.inputs = ForwardInputs(None, 0, False)  # of this forward
        self.attended: set[int] = set()  # layers, in this forward
        self.read_in_forward: dict[tuple, tuple[Callable[[], Any], list[RowsSeen]]] = {}

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.clear()
        self.inputs = read_forward(module, args, kwargs)

    def clear(self, *_: Any) -> None:
        self.attended.clear()
        self.read_in_forward.clear()

    def check_complete(self, *_: Any) -> None:
        for layer in self.layers.values():
            if layer.number not in self.attended:
                raise RecordingError(
                    f"layer {layer.number} ({type(layer.module).__name__}) was not seen to attend through attention "
                    f"implementation {layer.module.config._attn_implementation!r}: the needle was not hidden from it"
                )

    def hides(self, module: nn.Module) -> HiddenKeys:
        """See `attention_registry.Intervention`."""
        return self.hidden[id(module)]

    def attend(
        self, module: nn.Module, implementation: str, given: InterfaceCall, attend: Callable[[], tuple]
    ) -> tuple:
        """See `attention_registry.Intervention`."""
        layer = self.layers[id(module)]
        if layer.number in self.attended:
            raise several_calls(layer)
        self.attended.add(layer.number)
        refuse_call(module, given.others)
        result = attend()
        hidden = registry.hidden_from(module)
        if hidden[-1] is not self.hides(module):
            return result  # the last one hides what all of them do
        query, key, value = (x.to(multiplied_as(x.dtype, x.device)) for x in given.qkv)
        parts = list(heads_parts(hidden, len(query), query.shape[1], key.shape[1]))
        with exact():
            output = result[0].clone()
            for seen in self._seen(layer, implementation, given):
                for part in parts:
                    _attend_to_the_rest(output, part, seen, (query, key, value), softmax_arguments(given.others))
            end = end_of_call(layer, self.inputs, query.shape[2], key.shape[2])
            weights = _without_needle(result[1], parts, max(end - key.shape[2], 0))
        return (output, weights, *result[2:])

    def _seen(self, layer: AttentionLayer, implementation: str, given: InterfaceCall) -> Iterator[RowsSeen]:
        """All rows of a call, some at a time, as steps of the call; what shares a mask in a forward reads it once."""
        query, key, _ = given.qkv
        batch, n_queries, n_keys = len(query), query.shape[2], key.shape[2]
        end = end_of_call(layer, self.inputs, n_queries, n_keys)
        masking = masking_arguments(layer.module, given.others)
        size = ROWS_AT_ONCE if given.mask is None else max(1, min(ROWS_AT_ONCE, MASK_AT_ONCE // (batch * n_keys)))
        for start in range(0, n_queries, size):
            rows = torch.arange(start, min(start + size, n_queries))[None]
            call = Call(rows, batch, n_queries, n_keys, max(end - n_keys, 0), query.device)
            name = (id(given.mask), start, n_queries, n_keys, query.device, implementation, *masking.values())
            mask, seen = self.read_in_forward.get(name, (None, []))
            if mask is None or mask() is not given.mask:
                seen = read_visibility(given.mask, call, implementation=implementation, **masking)
                self.read_in_forward[name] = mask_reference(given.mask), seen
            for some in seen:
                yield some._replace(steps=[start + step for step in some.steps])


def _attend_to_the_rest(
    output: Tensor, part: HeadsPart, seen: RowsSeen, qkv: tuple[Tensor, Tensor, Tensor], attention: dict[str, Any]
) -> None:
    """Write into the model's head outputs (B, Sq, H, Dv) those of the part's heads without what is hidden from them."""
    key, value = map(part.of_keys, qkv[1:])
    spans = part.spans.to(key.device)
    bounds = part.bounds(seen.visibility)
    sees = count_span_visible(bounds, spans, len(key), key.shape[2]).any(-1)  # (b, T)
    which = sees.any(0).nonzero()[:, 0]
    if not len(which):
        return
    first, last = int(which[0]), int(which[-1]) + 1
    steps = slice(seen.steps[0] + first, seen.steps[0] + last)  # those of `seen` follow each other
    query = part.of_heads(qkv[0][:, :, steps])
    summary = ops.attention_summary(
        query,
        key,
        value,
        [(start + bounds.kv_offset, end + bounds.kv_offset) for start, end in _pieces(query, key.shape[2])],
        part.visibility(_rows(seen.visibility, first, last), key),
        **part.of_arguments(attention),
    )
    rest = summary.span_output.sum(3).transpose(1, 2).to(output.dtype)  # (b, T, h, Dv)
    there = output[part.rows, steps]
    there[:, :, part.heads] = torch.where(sees[:, first:last, None, None], rest, there[:, :, part.heads])


def _pieces(query: Tensor, n_keys: int) -> list[tuple[int, int]]:
    """Everything, as one span of columns, or as several where one would leave a GPU idle."""
    size = KEYS_PER_PROGRAM if query.device.type != "cpu" and query.shape[2] < FEW_ROWS else n_keys
    return [(start, min(start + size, n_keys)) for start in range(0, n_keys, size)]


def _rows(visibility: Visibility, first: int, last: int) -> Visibility:
    return visibility._replace(first=visibility.first[..., first:last], last=visibility.last[..., first:last])


def _without_needle(weights: Tensor | None, parts: list[HeadsPart], kv_offset: int) -> Tensor | None:
    """Attention weights (B, H, Sq, N), where an implementation returns them, as the heads would have made them."""
    if not isinstance(weights, Tensor):
        return weights
    weights = weights.clone()
    for part in parts:
        of_heads = part.of_heads(weights)
        hidden = hidden_columns(part.spans, kv_offset, weights.shape[3], weights.device)[:, None, None]
        rest = of_heads.masked_fill(hidden, 0)
        left = torch.maximum(1 - (of_heads - rest).sum(-1, keepdim=True), rest.sum(-1, keepdim=True))
        weights[part.rows, part.heads] = rest / torch.where(left > 0, left, 1)
    return weights
