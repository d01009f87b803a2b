"""The one door into a model: its attention calls, cut down to the answer rows, while it runs.

`attention_calls` wraps the attention implementation the model already uses, in transformers' own registry, and lets it
do its work. Names, masks and configuration are never touched, so the model's outputs are bit-identical, and the
registry is put back on exit, also after an exception. What is done with a call is the caller's business: `recording`
keeps summaries, `attribute_tokens` sums contributions.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast import ops
from locos_fast.models.architecture import AttentionLayer, UnsupportedModelError, attention_layers, decoder
from locos_fast.models.attention_registry import RecordingError, registry
from locos_fast.models.cost import Stopwatch, timed
from locos_fast.models.forward_inputs import ForwardInputs, read_forward
from locos_fast.models.hidden_keys import BEFORE_HEADS, HeadsPart, HiddenKeys, Sums, heads_parts
from locos_fast.models.mask_reading import Call, RowsSeen, read_visibility, select_rows
from locos_fast.ops.arguments import checked_spans, span_table
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.exact import exact, multiplied_as
from locos_fast.ops.visibility import KeyCounts, count_keys

UNSUPPORTED_ARGUMENTS = ("indices", "block_indices", "position_bias", "cache")  # sparse, biased or paged attention


class RowsCall(NamedTuple):
    """One attention call at the answer rows that it computed; what it refers to does not outlive the layer."""

    layer: AttentionLayer
    steps: Tensor  # which of the answer rows these are, (T,) int64 on the CPU
    inside: Tensor  # (B or 1, T) bool on the CPU: batch rows whose row was computed in this call
    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, Hkv, N, D)
    value: Tensor  # (B, Hkv, N, Dv)
    output: Tensor  # (B, T, H, Dv) head outputs before the output projection
    seen: list[RowsSeen]
    counts: Sequence[KeyCounts | None]  # of each entry of `seen` for the recorded spans; None if others are asked for
    attention: dict[str, Any]  # scale, softcap, sinks, backend, as `locos_fast.ops` takes them
    hidden: Sequence[HiddenKeys] = ()  # from some of the heads, see `attention_registry.Intervention`

    def summary(self, spans: Tensor) -> Summary:
        """`ops.attention_summary` of all rows.

        Keys that are hidden from a head are no part of its sums, its LSE and its argmax; `visible` and `span_visible`
        count what the mask lets a row see."""
        whole = self._summary(spans)
        for part in self._parts():
            part.write(whole, self._of_part(part)._summary(part.of_rows(spans)))
        return whole

    def contribution(self, direction: Tensor, spans: Tensor) -> Contributions:
        """`ops.attention_contribution` of all rows; `direction` is (B, H, T, Dv). Hidden keys as in `summary`."""
        whole = self._contribution(direction, spans)
        for part in self._parts():
            less = self._of_part(part)._contribution(part.of_heads(direction), part.of_rows(spans))
            part.write(whole, less)
        return whole

    def _parts(self) -> Iterator[HeadsPart]:
        return heads_parts(self.hidden, len(self.query), self.query.shape[1], self.key.shape[1])

    def _of_part(self, part: HeadsPart) -> RowsCall:
        """The call of these heads alone, as they see it."""
        key = part.of_keys(self.key)
        return self._replace(
            query=part.of_heads(self.query),
            key=key,
            value=part.of_keys(self.value),
            seen=[seen._replace(visibility=part.visibility(seen.visibility, key)) for seen in self.seen],
            counts=[None] * len(self.seen),
            attention=part.of_arguments(self.attention),
        )

    def _summary(self, spans: Tensor) -> Summary:
        return self._over_rows(
            lambda seen, counts: ops.attention_summary(
                self._of(self.query, seen),
                self.key,
                self.value,
                spans,
                seen.visibility,
                counts=counts,
                **self.attention,
            )
        )

    def _contribution(self, direction: Tensor, spans: Tensor) -> Contributions:
        return self._over_rows(
            lambda seen, counts: ops.attention_contribution(
                self._of(self.query, seen),
                self.key,
                self.value,
                self._of(direction, seen),
                spans,
                seen.visibility,
                counts=counts,
                **self.attention,
            )
        )

    def _of(self, x: Tensor, seen: RowsSeen) -> Tensor:
        return x if len(seen.steps) == x.shape[2] else x[:, :, seen.steps]

    def _over_rows(self, compute: Callable[[RowsSeen, KeyCounts | None], Sums]) -> Sums:
        """Rows whose keys have different holes are computed one by one."""
        parts = [compute(seen, counts) for seen, counts in zip(self.seen, self.counts, strict=True)]
        if len(parts) == 1:
            return parts[0]
        fields = zip(parts[0]._fields, zip(*parts, strict=True), strict=True)
        return type(parts[0])(*(torch.cat(field, 1 if name in BEFORE_HEADS else 2) for name, field in fields))


@contextlib.contextmanager
def attention_calls(
    model: PreTrainedModel,
    rows: Sequence[int] | Tensor,
    spans: ops.Spans,
    backend: str,
    receive: Callable[[RowsCall], None],
    watch: Stopwatch | None = None,
) -> Iterator[AnswerRows]:
    """Hand every attention call that computes answer rows to `receive` while the model runs inside the context.

    rows: slots of the query rows, (T,) or (B, T). spans: whose visible keys are counted, see `ops.Spans`.
    watch: adds up the time that observing takes.

    Raises UnsupportedModelError for models that cannot be recorded, ValueError for rows and spans that do not fit, and
    RecordingError for nested recordings of one model.
    """
    observer = AnswerRows(model, rows, spans, backend, receive, watch)
    hooks = [
        observer.decoder.register_forward_pre_hook(observer.before_forward, with_kwargs=True),
        observer.decoder.register_forward_hook(observer.after_forward, always_call=True),
    ]
    try:
        with registry.lend((layer.module for layer in observer.layers), observer):
            yield observer
    finally:
        for hook in hooks:
            hook.remove()
        observer.after_forward()


class MaskRead(NamedTuple):
    """What one distinct mask of a forward pass lets the answer rows see; the same for all layers that are given it."""

    mask: Callable[[], Any]  # a dead mask's id may serve another one
    seen: list[RowsSeen]
    counts: list[KeyCounts]


class AnswerRows:
    """Observes the attention layers of one model and cuts their calls down to the answer rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[int] | Tensor,
        spans: ops.Spans,
        backend: str,
        receive: Callable[[RowsCall], None],
        watch: Stopwatch | None,
    ) -> None:
        self.layers = attention_layers(model)
        self.decoder = decoder(model)
        self.rows = row_table(rows)
        self.spans = checked_spans(spans)  # (B or 1, S, 2) on the CPU
        self.backend, self.receive, self.watch = backend, receive, watch
        self.layer_of = {id(layer.module): layer for layer in self.layers}
        self.filled: dict[int, Tensor] = {}  # layer -> (B or 1, T) bool: which rows were computed
        self.in_forward: dict[int, Tensor] = {}  # the same, of this forward
        self.inputs = ForwardInputs(None, 0, False)  # of this forward
        self.read_in_forward: dict[tuple, MaskRead] = {}

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs = read_forward(module, args, kwargs)
        self.after_forward()

    def after_forward(self, *_: Any) -> None:
        self.read_in_forward.clear()
        self.in_forward.clear()

    def observe(
        self,
        module: nn.Module,
        implementation: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        output: Tensor,
        kwargs: dict,
    ) -> None:
        """One attention call; see `attention_registry.Observer`."""
        layer = self.layer_of[id(module)]
        refuse_call(module, kwargs)
        batch, _, n_queries, _ = qkv[0].shape
        if len(self.rows) not in (1, batch):
            raise ValueError(f"rows: expected (T,) or ({batch}, T) slots, got {tuple(self.rows.shape)}")
        end = end_of_call(layer, self.inputs, n_queries, qkv[1].shape[2])
        local = self.rows - (end - n_queries)
        inside = (local >= 0) & (local < n_queries)  # (B or 1, T)
        steps = inside.any(0).nonzero()[:, 0]
        if len(steps):
            self._refuse_second_call(layer, inside)
            with timed(self.watch, output.device):
                query, key, value = (x.to(multiplied_as(x.dtype, x.device)) for x in qkv)
                with exact():
                    self._hand_over(
                        layer, implementation, (query, key, value), mask, output, kwargs, end, steps, inside[:, steps]
                    )

    def _refuse_second_call(self, layer: AttentionLayer, inside: Tensor) -> None:
        before = self.in_forward.get(layer.number)
        if before is not None and bool((before & inside).any()):
            raise several_calls(layer)
        self.in_forward[layer.number] = inside if before is None else before | inside

    def _hand_over(
        self,
        layer: AttentionLayer,
        implementation: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        output: Tensor,
        kwargs: dict,
        end: int,
        steps: Tensor,
        inside: Tensor,
    ) -> None:
        """Cut the call, whose last query is slot `end` - 1, down to the answer rows `steps`."""
        query, key, value = qkv
        batch, _, n_queries, _ = query.shape
        n_keys = key.shape[2]
        rows = (self.rows[:, steps] - (end - n_queries)).clamp(0, n_queries - 1)
        call = Call(rows, batch, n_queries, n_keys, max(end - n_keys, 0), query.device)
        read = self._read(mask, call, layer.module, implementation, kwargs)
        attention = softmax_arguments(kwargs) | {"backend": self.backend}
        hidden = registry.hidden_from(layer.module)
        chosen = select_rows(query.transpose(1, 2), rows).transpose(1, 2)  # (B, H, T, D)
        kept = select_rows(output.detach(), rows)
        self.receive(
            RowsCall(layer, steps, inside, chosen, key, value, kept, read.seen, read.counts, attention, hidden)
        )
        if layer.number not in self.filled:
            self.filled[layer.number] = torch.zeros_like(self.rows, dtype=torch.bool)
        self.filled[layer.number][:, steps] |= inside

    def _read(self, mask: Any, call: Call, module: nn.Module, implementation: str, kwargs: dict) -> MaskRead:
        masking = masking_arguments(module, kwargs)
        key = (id(mask), call.n_queries, call.n_keys, call.device, implementation, *masking.values())
        known = self.read_in_forward.get(key)
        if known is None or known.mask() is not mask:
            seen = read_visibility(mask, call, implementation=implementation, **masking)
            spans = span_table(self.spans, call.batch).to(call.device)
            counts = [count_keys(visibility, spans, call.batch, call.n_keys) for _, visibility in seen]
            known = self.read_in_forward[key] = MaskRead(mask_reference(mask), seen, counts)
        return known

    def check_complete(self) -> None:
        """Raises RecordingError for a layer or a row that was never computed."""
        for layer in self.layers:
            filled = self.filled.get(layer.number)
            if filled is None or not bool(filled.any()):
                raise RecordingError(
                    f"layer {layer.number} ({type(layer.module).__name__}) never computed an answer row through "
                    f"attention implementation {layer.module.config._attn_implementation!r}; "
                    "was the model run inside the context, and over the rows asked for?"
                )
            if not bool(filled.all()):
                missing = sorted(set(self.rows[~filled].tolist()))
                raise RecordingError(f"rows {missing} were never computed in layer {layer.number}")


def mask_reference(mask: Any) -> Callable[[], Any]:
    """A reference that does not keep the mask alive: under a device map every layer may be given its own copy."""
    return (lambda: None) if mask is None else weakref.ref(mask)


def row_table(rows: Sequence[int] | Tensor) -> Tensor:
    """(B or 1, T) int64 on the CPU. Raises ValueError for anything but whole numbers >= 0, a bool mask say."""
    wanted = f"rows: expected (T,) or (B, T) slots >= 0, whole numbers, got {rows!r}"
    try:
        table = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(wanted) from error
    table = table[None] if table.ndim == 1 else table
    whole = table.dtype != torch.bool and not table.is_floating_point() and not table.is_complex()
    if not whole or table.ndim != 2 or table.numel() == 0 or bool((table < 0).any()):
        raise ValueError(wanted)
    return table.to("cpu", torch.int64)


def several_calls(layer: AttentionLayer) -> UnsupportedModelError:
    """For a layer that computes the heads of one row in more than one call."""
    return UnsupportedModelError(
        f"layer {layer.number} ({type(layer.module).__name__}) calls its attention function several times for one row, "
        "and what it makes of the outputs cannot be followed"
    )


def end_of_call(layer: AttentionLayer, inputs: ForwardInputs, n_queries: int, n_keys: int) -> int:
    """The slot behind a call's last query; raises RecordingError where it cannot be told."""
    # a layer may be given only the last tokens as queries (Gemma-4's layers that share keys and values)
    tokens = n_queries if inputs.tokens is None else inputs.tokens
    if not inputs.cached and n_keys > tokens:
        raise RecordingError(
            f"layer {layer.number} ({type(layer.module).__name__}) attends to {n_keys} keys in a forward of "
            f"{tokens} tokens, and no transformers.Cache was found among its arguments: the rows cannot be placed"
        )
    return inputs.past + tokens


def softmax_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """How an attention function makes weights of scores, as `locos_fast.ops` takes it."""
    return {"scale": kwargs.get("scaling"), "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}


def masking_arguments(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an attention function is told about its mask beside the mask, as `read_visibility` takes it."""
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return {"is_causal": is_causal, "window": kwargs.get("sliding_window")}


def refuse_call(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError for attention that is computed from more than queries, keys, values and a mask."""
    name = type(module).__name__
    for argument in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(f"{name} passes {argument!r} to its attention, which cannot be recorded")
    if kwargs.get("dropout"):
        raise UnsupportedModelError(f"{name} applies attention dropout; call model.eval() before recording")
