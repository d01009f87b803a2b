"""record(): the one door into a model.

It wraps the attention implementation the model already uses, in transformers' own registry, and lets it do its work;
for the answer rows it keeps the head outputs and a `Summary`, and nothing else. Names, masks and configuration are
never touched, so the model's outputs are bit-identical, and the registry is put back on exit, also after an exception.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from locos_fast import ops
from locos_fast.architecture import AttentionLayer, UnsupportedModelError, attention_layers, decoder, forward_globals
from locos_fast.contributions import Summary
from locos_fast.mask_reading import Call, RowsSeen, read_visibility, select_rows

UNSUPPORTED_ARGUMENTS = ("indices", "block_indices", "position_bias", "cache")  # sparse, biased or paged attention


class RecordingError(RuntimeError):
    """A recording that was asked for did not come about, or does not reproduce what the model computed."""


class LayerRecord(NamedTuple):
    """What one attention layer left for the answer rows; see `Summary` for the fields after `output`."""

    output: Tensor  # (B, T, H, Dv) head outputs before the output projection, in the model's dtype
    span_output: Tensor  # (B, H, T, S, Dv)
    mass: Tensor  # (B, H, T, S)
    total_mass: Tensor  # (B, H, T)
    lse: Tensor  # (B, H, T)
    argmax: Tensor  # (B, H, T)
    visible: Tensor  # (B, T)
    span_visible: Tensor  # (B, T, S)


# where the answer rows are in each field of a LayerRecord
ROW_AXIS = {
    "output": 1,
    "span_output": 2,
    "mass": 2,
    "total_mass": 2,
    "lse": 2,
    "argmax": 2,
    "visible": 1,
    "span_visible": 1,
}


class Recording(Mapping[int, LayerRecord]):
    """Layer number -> `LayerRecord`, for the softmax-attention layers of one model, in layer order."""

    def __init__(self) -> None:
        self._records: dict[int, LayerRecord] = {}

    def __getitem__(self, layer: int) -> LayerRecord:
        return self._records[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._records))

    def __len__(self) -> int:
        return len(self._records)


@contextlib.contextmanager
def record(
    model: PreTrainedModel,
    rows: Sequence[int] | Tensor,
    spans: ops.Spans,
    *,
    backend: str = "auto",
    verify: bool = False,
) -> Iterator[Recording]:
    """Record the answer rows of every attention layer while the model runs inside the context.

        with record(model, rows=[99], spans=[(10, 20)]) as recording:
            model(input_ids)
        recording[3].output  # (B, T, H, Dv)

    rows: slots (indices into the sequence, padding included) of the T query rows to keep, or a (B, T) int tensor giving
    each batch row its own. The row that predicts token p is p - 1. They may be computed in one forward, in chunks with
    a cache, or in decode steps.
    spans: slots of the keys to sum over, see `locos_fast.ops.Spans`.
    verify: recompute, per layer, the sum of a random direction's contributions from queries, keys and values, and
    compare it with direction . output. It reads V once more and catches a mask, scale, cap or sink that was misread.

    Raises UnsupportedModelError for models that cannot be recorded, ValueError for rows and spans that do not fit,
    RecordingError for nested recordings of one model, and on exit if a layer or a row was never computed.
    """
    recorder = _Recorder(model, rows, spans, backend, verify)
    with recorder.attached():
        yield recorder.recording
    recorder.check_complete()


class _Recorder:
    """Keeps the answer rows of one model's attention layers."""

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[int] | Tensor, spans: ops.Spans, backend: str, verify: bool
    ) -> None:
        self.layers = attention_layers(model)
        self.decoder = decoder(model)
        self.rows = _row_table(rows)
        self.spans = ops.checked_spans(spans)
        self.backend, self.verify = backend, verify
        self.recording = Recording()
        self.filled: dict[int, Tensor] = {}  # layer -> (B or 1, T) bool: which rows were computed
        self.past = 0  # slots computed before this forward
        self.tokens: int | None = None  # and in it
        self.seen_in_forward: dict[tuple, tuple[Callable[[], Any], list[RowsSeen]]] = {}  # by distinct mask
        self.layer_of = {id(layer.module): layer for layer in self.layers}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        names = {layer.module.config._attn_implementation for layer in self.layers}
        hooks = [
            self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_forward, always_call=True),
        ]
        try:
            with _registry.lend(names, self):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.seen_in_forward.clear()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        cache = bound.get("past_key_values") or bound.get("kwargs", {}).get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        given = next((bound[name] for name in ("input_ids", "inputs_embeds") if bound.get(name) is not None), None)
        self.tokens = None if given is None else given.shape[1]
        self.seen_in_forward.clear()

    def _after_forward(self, *_: Any) -> None:
        self.seen_in_forward.clear()

    @torch.no_grad()
    def observe(
        self,
        module: nn.Module,
        implementation: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        output: Tensor,
        kwargs: dict,
    ) -> None:
        """Keep the answer rows among the queries of one attention call."""
        layer = self.layer_of[id(module)]
        _refuse_call(module, kwargs)
        query, key, value = qkv
        batch, _, n_queries, _ = query.shape
        if len(self.rows) not in (1, batch):
            raise ValueError(f"rows: expected (T,) or ({batch}, T) slots, got {tuple(self.rows.shape)}")
        # a layer may be given only the last tokens as queries (Gemma-4's layers that share keys and values)
        end = self.past + (n_queries if self.tokens is None else self.tokens)
        local = self.rows - (end - n_queries)
        inside = (local >= 0) & (local < n_queries)  # (B or 1, T)
        steps = inside.any(0).nonzero()[:, 0]
        if len(steps) == 0:
            return
        rows = local[:, steps].clamp(0, n_queries - 1)
        n_keys = key.shape[2]
        call = Call(rows, batch, n_queries, n_keys, max(end - n_keys, 0), query.device)
        chosen = select_rows(query.transpose(1, 2), rows).transpose(1, 2)  # (B, H, T, D)
        seen = self._visibility(mask, call, module, implementation, kwargs)
        attention = {
            "scale": kwargs.get("scaling"),
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
            "backend": self.backend,
        }
        summary = _summarise(chosen, key, value, self.spans, seen, attention)
        kept = LayerRecord(select_rows(output.detach(), rows).clone(), *_record_order(summary))
        if self.verify:
            _verify(layer, chosen, key, value, seen, attention, kept.output)
        self._keep(layer.number, kept, steps, inside[:, steps])

    def _visibility(
        self, mask: Any, call: Call, module: nn.Module, implementation: str, kwargs: dict
    ) -> list[RowsSeen]:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window = kwargs.get("sliding_window")
        key = (id(mask), call.n_keys, call.device, implementation, is_causal, window)
        known = self.seen_in_forward.get(key)
        if known is None or known[0]() is not mask:  # a dead mask's id may serve another one
            seen = read_visibility(mask, call, implementation=implementation, is_causal=is_causal, window=window)
            known = self.seen_in_forward[key] = (_reference(mask), seen)
        return known[1]

    def _keep(self, index: int, kept: LayerRecord, steps: Tensor, inside: Tensor) -> None:
        """Merge the rows of this call into the layer's record."""
        n_rows = self.rows.shape[1]
        if index not in self.filled:
            self.filled[index] = torch.zeros_like(self.rows, dtype=torch.bool)
        whole = len(steps) == n_rows and bool(inside.all())
        if whole:
            self.recording._records[index] = kept
        else:
            if index not in self.recording._records:
                self.recording._records[index] = LayerRecord(*map(_blank(n_rows), kept, ROW_AXIS.values()))
            for into, part, axis in zip(self.recording._records[index], kept, ROW_AXIS.values(), strict=True):
                _write_rows(into.movedim(axis, 1), part.movedim(axis, 1), steps, inside)
        self.filled[index][:, steps] |= inside

    def check_complete(self) -> None:
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


class _Registry:
    """Lends entries of transformers' attention registry to recorders, and puts them back when the last one leaves."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.recorders: dict[int, _Recorder] = {}  # id of an attention module -> who records it
        self.lent: dict[str, tuple[int, Callable | None]] = {}  # name -> (recorders using it, the entry before)

    @contextlib.contextmanager
    def lend(self, names: set[str], recorder: _Recorder) -> Iterator[None]:
        modules = list(recorder.layer_of)
        with self.lock:
            if any(module in self.recorders for module in modules):
                raise RecordingError("this model is already being recorded; recordings of one model cannot be nested")
            self.recorders.update(dict.fromkeys(modules, recorder))
            for name in names:
                self._install(name)
        try:
            yield
        finally:
            with self.lock:
                for module in modules:
                    del self.recorders[module]
                for name in names:
                    self._restore(name)

    def _install(self, name: str) -> None:
        users, before = self.lent.get(name, (0, None))
        if users == 0:
            before = AttentionInterface._global_mapping.get(name)
            AttentionInterface.register(name, self._wrapper(name, before))
        self.lent[name] = (users + 1, before)

    def _restore(self, name: str) -> None:
        users, before = self.lent[name]
        if users > 1:
            self.lent[name] = (users - 1, before)
            return
        del self.lent[name]
        if before is None:
            del AttentionInterface._global_mapping[name]
        else:
            AttentionInterface.register(name, before)

    def _wrapper(self, name: str, before: Callable | None) -> Callable:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
            implementation = before or _eager_attention(module)
            result = implementation(module, query, key, value, mask, **kwargs)
            recorder = self.recorders.get(id(module))
            if recorder is not None:
                recorder.observe(module, name, (query, key, value), mask, result[0], kwargs)
            return result

        return attention


_registry = _Registry()


def _eager_attention(module: nn.Module) -> Callable:
    """The function a model falls back to for "eager": it lives in the model's own source file, not in the registry."""
    names = forward_globals(module)
    for name in inspect.unwrap(type(module).forward).__code__.co_names:
        if name.endswith("eager_attention_forward") and name in names:
            return names[name]
    raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function to record")


def _reference(mask: Any) -> Callable[[], Any]:
    """A reference that does not keep the mask alive: under a device map every layer may be given its own copy."""
    return (lambda: None) if mask is None else weakref.ref(mask)


def _row_table(rows: Sequence[int] | Tensor) -> Tensor:
    """(B or 1, T) int64 on the CPU."""
    table = torch.as_tensor(rows).to("cpu", torch.int64)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] == 0 or bool((table < 0).any()):
        raise ValueError(f"rows: expected (T,) or (B, T) slots >= 0, got {rows!r}")
    return table


def _refuse_call(module: nn.Module, kwargs: dict) -> None:
    name = type(module).__name__
    for argument in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(f"{name} passes {argument!r} to its attention, which cannot be recorded")
    if kwargs.get("dropout"):
        raise UnsupportedModelError(f"{name} applies attention dropout; call model.eval() before recording")


def _summarise(
    query: Tensor, key: Tensor, value: Tensor, spans: ops.Spans, seen: list[RowsSeen], attention: dict
) -> Summary:
    parts = [
        ops.attention_summary(_take(query, rows), key, value, spans, visibility, **attention)
        for rows, visibility in seen
    ]
    if len(parts) == 1:
        return parts[0]
    return Summary(
        *(
            torch.cat(fields, ROW_AXIS[name])
            for name, fields in zip(Summary._fields, zip(*parts, strict=True), strict=True)
        )
    )


def _take(query: Tensor, rows: list[int]) -> Tensor:
    return query if len(rows) == query.shape[2] else query[:, :, rows]


def _record_order(summary: Summary) -> Iterator[Tensor]:
    return (getattr(summary, name) for name in LayerRecord._fields[1:])


def _blank(n_rows: int) -> Callable[[Tensor, Any], Tensor]:
    """Room for all rows of a field of which some rows are known."""

    def blank(part: Tensor, axis: int) -> Tensor:
        shape = list(part.shape)
        shape[axis] = n_rows
        return part.new_zeros(shape)

    return blank


def _write_rows(into: Tensor, part: Tensor, steps: Tensor, inside: Tensor) -> None:
    """into: (B, T, ...), part: (B, len(steps), ...); only the (batch row, step) pairs that `inside` marks."""
    steps, inside = steps.to(into.device), inside.to(into.device)
    mask = inside.view(*inside.shape, *(1 for _ in part.shape[2:]))
    into[:, steps] = torch.where(mask, part, into[:, steps])


def _verify(
    layer: AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: list[RowsSeen],
    attention: dict,
    output: Tensor,
) -> None:
    """direction . output must equal the sum of the direction's contributions, within the rounding of the output."""
    generator = torch.Generator().manual_seed(layer.number)
    dtype = torch.promote_types(value.dtype, torch.float32)
    heads, value_dim = output.shape[2], output.shape[3]
    direction = torch.randn((heads, value_dim), generator=generator).to(query.device, dtype)
    for rows, visibility in seen:
        kept = output if len(rows) == output.shape[1] else output[:, rows]
        w = direction[None, :, None].expand(len(output), -1, len(rows), -1)
        span = [(0, visibility.kv_offset + key.shape[2])]
        total = ops.attention_contribution(_take(query, rows), key, value, w, span, visibility, **attention).total
        size = ops.attention_contribution(
            _take(query, rows), key, value.abs(), w.abs(), span, visibility, **attention
        ).total
        error = (total - torch.einsum("bthd,hd->bht", kept.to(dtype), direction)).abs()
        if bool((error > _rounding(value.dtype) * size + torch.finfo(dtype).tiny).any()):
            raise RecordingError(
                f"layer {layer.number} ({type(layer.module).__name__}): the recorded attention does not reproduce the "
                f"head outputs (largest error {float(error.max()):.3g} logits of a random direction); its mask, scale, "
                "softcap or sinks were misread"
            )


def _rounding(dtype: torch.dtype) -> float:
    """The error of a correct reading, relative to sum_j alpha_j (|w| . |v_j|): half-precision outputs and attention
    weights are rounded to `dtype`, and models take their softmax in float32 whatever the dtype."""
    return max(4 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
