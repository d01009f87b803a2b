"""What every head wrote toward the answer from every segment of the context, computed inside one forward pass.

    attribution[layer, head, segment] = mean over answer rows t of  sum over j in segment of phi[t, j, head]

with phi[t, j, h] = alpha[t, j, h] * (w[t, h] . v[j, h // G]) (LOCOS, arXiv 2607.01002). Project, then sum: the
directions w are known when a layer's attention runs, so its queries, keys and values turn straight into sums per
segment, in one pass over keys and values however many segments there are. Nothing is formed that is larger than (rows x
segments): no attention row, no head output, no (segments x head_dim) block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits, check_prompt
from locos_fast.models.architecture import layer_count
from locos_fast.models.attention_calls import RowsCall, attention_calls
from locos_fast.models.head_map import check_head_map, not_handed_over
from locos_fast.models.residual_stream import take_rows
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.ops.arguments import checked_spans
from locos_fast.ops.exact import exact
from locos_fast.scoring.directions import Target, head_directions, token_directions
from locos_fast.scoring.finite import check_layer
from locos_fast.scoring.token_ids import check_token_ids

Span = tuple[int, int]


def attribute_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    answer_positions: Sequence[int],
    segments: Sequence[Span],
    *,
    backend: str = "auto",
    token_chunk: int | None = TOKENS_PER_CHUNK,
) -> NDArray:
    """Attribute the answer to segments of the context: what each head wrote toward it from each of them.

    input_ids: (1, N) int64, the prompt followed by the answer (teacher forcing).
    answer_positions: indices in `input_ids` of the answer tokens; row p - 1 predicts token p.
    segments: half-open (start, end) token indices. They may overlap and leave gaps; each is summed on its own.
    backend, token_chunk: see `locos_fast.ops` and `score_tokens`.

    Returns (layers, heads, segments), float32 (float64 for float64 models), in the units of the published score
    (`norm="none"`): dot products with the raw unembedding row, mean over the answer rows; a row that does not see a
    segment counts as zero. So the segments of a partition sum to the head's DLA, and where every answer row sees the
    needle, the segment of the needle is its L+. Layers without softmax attention are NaN.
    Raises ValueError for arguments that do not fit and UnsupportedModelError for models that cannot be recorded.
    """
    return attribute_and_predict(
        model, input_ids, answer_positions, segments, backend=backend, token_chunk=token_chunk
    )[0]


def attribute_and_predict(
    model: PreTrainedModel,
    input_ids: Tensor,
    answer_positions: Sequence[int],
    segments: Sequence[Span],
    *,
    backend: str = "auto",
    token_chunk: int | None = TOKENS_PER_CHUNK,
) -> tuple[NDArray, list[int]]:
    """As `attribute_tokens`; also the tokens that the model itself would have written at the answer's positions, in
    increasing order, those before each given."""
    positions = sorted(check_prompt(input_ids, answer_positions))
    check_token_ids(model, input_ids, positions)
    table = _segment_table(segments, input_ids.shape[1])
    rows = [position - 1 for position in positions]
    sums = _SegmentSums(table, rows)
    check_head_map(model, input_ids[:, : rows[-1] + 1])
    with torch.inference_mode():
        sums.direction = token_directions(model, Target(input_ids[0, positions]))
        with (
            attention_calls(model, rows, table, backend, sums.receive) as calls,
            sums.projections(layer.projection for layer in calls.layers),
            token_chunks(model, token_chunk),
        ):
            logits = answer_logits(model, input_ids[:, : rows[-1] + 1], rows)
            sums.expect_none()
        calls.check_complete()
        return sums.result(layer_count(model)), logits.argmax(-1).tolist()


class _SegmentSums:
    """Holds the attention call of the layer at work until its output projection is reached.

    Only there is it known whether something, a gate, stands between the heads and the projection.
    """

    direction: Tensor  # (T, hidden)

    def __init__(self, table: Tensor, rows: list[int]) -> None:
        self.table, self.rows = table, rows
        self.pending: RowsCall | None = None
        self.layers: dict[int, Tensor] = {}  # (H, S), on the layer's own device

    @contextlib.contextmanager
    def projections(self, modules: Iterator[nn.Module]) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._project, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            self.pending = None
            for hook in hooks:
                hook.remove()

    def receive(self, call: RowsCall) -> None:
        self.expect_none()
        self.pending = call

    def expect_none(self) -> None:
        """Raises RecordingError if a layer never came to its output projection."""
        if self.pending is not None:
            raise not_handed_over(self.pending.layer)

    @exact()
    def _project(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call, self.pending = self.pending, None
        if call is None:  # no answer row in this call, or the projection is being read with basis vectors
            return
        given = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))
        projected = take_rows(given, [self.rows[step] for step in call.steps])
        if call.layer.projection is not module or projected is None:
            raise not_handed_over(call.layer)
        w, _ = head_directions(module, self.direction.to(given.device), call.output[0], projected)
        sums = call.contribution(w.transpose(0, 1)[None], self.table)
        self.layers[call.layer.number] = sums.span[0].sum(1) / len(self.rows)

    def result(self, n_layers: int) -> NDArray:
        heads = max(len(sums) for sums in self.layers.values())
        dtype = np.float64 if self.direction.dtype == torch.float64 else np.float32
        result = np.full((n_layers, heads, self.table.shape[1]), np.nan, dtype)
        for number, sums in self.layers.items():
            result[number, : len(sums)] = sums.cpu().numpy()
            check_layer(number, result[number, : len(sums)])
        return result


def _segment_table(segments: Sequence[Span], tokens: int) -> Tensor:
    """(1, S, 2) int64. Raises ValueError, naming `segments`."""
    try:
        table = checked_spans(segments)
    except ValueError as error:
        raise ValueError(str(error).replace("spans:", "segments:", 1)) from error
    beyond = table[0, table[0, :, 1] > tokens]
    if len(beyond):
        raise ValueError(f"segments: expected spans inside the {tokens} tokens, got {tuple(beyond[0].tolist())}")
    return table
