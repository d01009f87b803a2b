"""record(): what scoring needs of the answer rows, kept while a model runs.

For the answer rows it keeps the head outputs and a `Summary` of every attention layer, and nothing else; see
`attention_calls` for how it gets at them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast import ops
from locos_fast.models.attention_calls import RowsCall, attention_calls, row_table
from locos_fast.models.attention_registry import RecordingError
from locos_fast.models.cost import Stopwatch
from locos_fast.ops.arguments import checked_spans
from locos_fast.ops.contributions import Summary

__all__ = ["LayerRecord", "Recording", "RecordingError", "record"]


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

    def at(self, rows: slice | list[int]) -> Recording:
        """The same recording with some of its rows only."""
        return self._map(lambda part, axis: part[(slice(None),) * axis + (rows,)])

    def of(self, batch_row: int, rows: int) -> Recording:
        """The first `rows` rows of one batch row."""
        one = slice(batch_row, batch_row + 1)
        return self._map(lambda part, axis: part[one][(slice(None),) * axis + (slice(rows),)])

    @classmethod
    def joined(cls, recordings: Sequence[Recording]) -> Recording:
        """The rows of several recordings of one batch row each, one behind the other."""
        if len(recordings) == 1:
            return recordings[0]
        result = cls()
        for layer in recordings[0]:
            fields = zip(*(recording[layer] for recording in recordings), strict=True)
            axes = ROW_AXIS.values()
            result._records[layer] = LayerRecord(*(torch.cat(f, axis) for f, axis in zip(fields, axes, strict=True)))
        return result

    def _map(self, change: Callable[[Tensor, int], Tensor]) -> Recording:
        """`change` takes a field and the axis of its rows."""
        result = Recording()
        for layer, kept in self._records.items():
            fields = zip(kept, ROW_AXIS.values(), strict=True)
            result._records[layer] = LayerRecord(*(change(part, axis) for part, axis in fields))
        return result


@contextlib.contextmanager
def record(
    model: PreTrainedModel,
    rows: Sequence[int] | Tensor,
    spans: ops.Spans,
    *,
    backend: str = "auto",
    verify: bool = False,
    watch: Stopwatch | None = None,
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
    watch: adds up the time that recording takes.

    Raises UnsupportedModelError for models that cannot be recorded, ValueError for rows and spans that do not fit,
    RecordingError for nested recordings of one model, and on exit if a layer or a row was never computed.
    """
    rows, table = row_table(rows), checked_spans(spans)
    kept = _Kept(rows.shape[1], table, verify)
    with attention_calls(model, rows, table, backend, kept.receive, watch) as calls:
        yield kept.recording
    calls.check_complete()


class _Kept:
    """Turns calls into the records of a recording."""

    def __init__(self, n_rows: int, spans: Tensor, verify: bool) -> None:
        self.n_rows, self.spans, self.verify = n_rows, spans, verify
        self.recording = Recording()

    def receive(self, call: RowsCall) -> None:
        kept = LayerRecord(call.output.clone(), *_record_order(call.summary(self.spans)))
        if self.verify:
            _verify(call)
        self._keep(call.layer.number, kept, call.steps, call.inside)

    def _keep(self, index: int, kept: LayerRecord, steps: Tensor, inside: Tensor) -> None:
        """Merge the rows of this call into the layer's record."""
        if len(steps) == self.n_rows and bool(inside.all()):
            self.recording._records[index] = kept
            return
        if index not in self.recording._records:
            self.recording._records[index] = LayerRecord(*map(_blank(self.n_rows), kept, ROW_AXIS.values()))
        for into, part, axis in zip(self.recording._records[index], kept, ROW_AXIS.values(), strict=True):
            _write_rows(into.movedim(axis, 1), part.movedim(axis, 1), steps, inside)


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


def _verify(call: RowsCall) -> None:
    """direction . output must equal the sum of the direction's contributions, within the rounding of the output."""
    layer, output, dtype = call.layer, call.output, call.value.dtype
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(layer.number)
    direction = torch.randn(output.shape[2:], generator=generator).to(output.device, wide)  # (H, Dv)
    w = direction[None, :, None].expand(len(output), -1, output.shape[1], -1)
    everything = torch.tensor([[[0, torch.iinfo(torch.int32).max]]])
    call = call._replace(counts=[None] * len(call.seen))
    total = call.contribution(w, everything).total
    size = call._replace(value=call.value.abs()).contribution(w.abs(), everything).total
    error = (total - torch.einsum("bthd,hd->bht", output.to(wide), direction)).abs()
    if bool((error > _rounding(dtype) * size + torch.finfo(wide).tiny).any()):
        raise RecordingError(
            f"layer {layer.number} ({type(layer.module).__name__}): the recorded attention does not reproduce the "
            f"head outputs (largest error {float(error.max()):.3g} logits of a random direction); its mask, scale, "
            "softcap or sinks were misread"
        )


def _rounding(dtype: torch.dtype) -> float:
    """The error of a correct reading, relative to sum_j alpha_j (|w| . |v_j|): half-precision outputs and attention
    weights are rounded to `dtype`, and models take their softmax in float32 whatever the dtype."""
    return max(4 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
