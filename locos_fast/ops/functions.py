"""The public tensor functions: check the arguments, pick a backend, call it.

LOCOS (arXiv 2607.01002) scores a head by its per-position logit contribution

    phi[t, j, h] = alpha[t, j, h] * (direction[t, h] . value[j, h // (H / Hkv)])

summed over spans of keys. Shapes: B batch, H query heads, Hkv key/value heads, T answer rows, N keys, S spans, D and Dv
head dimensions. Backends:

    "triton"     fused kernels (CUDA, ROCm; on a CPU only in Triton's interpreter, TRITON_INTERPRET=1)
    "torch"      blockwise PyTorch, any device; extra memory does not grow with N
    "reference"  the definition, naive; its memory grows with N
    "auto"       "triton" where the tensors are on a GPU and Triton is installed, else "torch"

No function records gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locos_fast.ops import reference, torch_backend
from locos_fast.ops.arguments import (
    Spans,
    check_attention,
    check_counts,
    check_device,
    check_direction,
    check_dtype,
    check_filled,
    check_groups,
    check_like,
    check_rank,
    require,
    shape_of,
    span_table,
)
from locos_fast.ops.backends import REFERENCE, Backend, BackendName, backend_for
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.exact import exact
from locos_fast.ops.visibility import KeyCounts, Visibility


@exact()
def ov_contribution(
    attn: Tensor,
    value: Tensor,
    direction: Tensor,
    spans: Spans,
    *,
    visible: Tensor | None = None,
    backend: BackendName = "auto",
) -> Contributions:
    """Sum phi over spans of keys, from given attention weights and values; no head output is formed.

    attn: (B, H, T, N) softmaxed weights. value: (B, Hkv, N, Dv). direction: (B, H, T, Dv) float32, usually
    W_O[h]^T d_y: then the sums are logits. spans: columns of `attn`; they may overlap and are summed separately.
    visible: (B, T) int64 number of keys each row could see; N where it is not given.

    Raises ValueError for shapes, dtypes, devices, spans and backends that do not fit.
    """
    check_rank("attn", attn, "(B, H, T, N)")
    batch, heads, rows, n_keys = attn.shape
    check_dtype("attn", attn)
    check_like("value", value, (batch, None, n_keys, None), attn)
    check_groups(heads, value.shape[1], "value")
    check_direction(direction, (batch, heads, rows, value.shape[3]), attn)
    for name, tensor in (("attn", attn), ("value", value)):
        check_filled(name, tensor)
    if visible is not None:
        require(
            isinstance(visible, Tensor) and visible.shape == (batch, rows) and visible.dtype == torch.int64,
            "visible",
            f"({batch}, {rows}) int64",
            f"{shape_of(visible)} {getattr(visible, 'dtype', '')}",
        )
        check_device("visible", visible, attn)
    chosen = backend_for(backend, attn)
    table = chosen.table(span_table(spans, batch), attn.device)
    return chosen.functions.ov_contribution(chosen.input(attn), chosen.input(value), direction, table, visible=visible)


@exact()
def attention_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    direction: Tensor,
    spans: Spans,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    counts: KeyCounts | None = None,
    backend: BackendName = "auto",
) -> Contributions:
    """Sum phi over spans of keys, from queries, keys and values; neither attention rows nor head outputs are formed.

    query: (B, H, T, D). key: (B, Hkv, N, D). value: (B, Hkv, N, Dv). direction: (B, H, T, Dv) float32, usually
    W_O[h]^T d_y: then the sums are logits. Views with any strides are read in place if their last stride is 1.
    spans: slots, see `Spans`; keys that are not present or not visible count as zero.
    scale: factor on the scores, D ** -0.5 if None. softcap: scores become softcap * tanh(score / softcap).
    sinks: (H,) one more logit per head, in the softmax denominator only.
    counts: `visibility.count_keys` of these spans and this visibility, where calls share them; counted here if None.

    A row that sees nothing has sums 0, lse -inf (or its sink) and argmax -1.
    Raises ValueError for shapes, dtypes, devices, spans and backends that do not fit.
    """
    attention = check_attention(query, key, value, visibility, scale, softcap, sinks)
    check_direction(direction, (*query.shape[:3], value.shape[3]), query)
    chosen, table = _over_spans(backend, query, spans, counts)
    return chosen.functions.attention_contribution(chosen.inputs(attention), direction, table, counts)


@exact()
def attention_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    counts: KeyCounts | None = None,
    backend: BackendName = "auto",
) -> Summary:
    """The lean path of scoring: one pass over the keys; values are read only inside the spans.

    Arguments and errors are those of `attention_contribution`, less the direction. Because the sum of phi over all keys
    is direction . head output, which a model computes anyway, a `Summary` and the head output together give every sum
    of `attention_contribution` for any direction chosen afterwards.
    """
    attention = check_attention(query, key, value, visibility, scale, softcap, sinks)
    chosen, table = _over_spans(backend, query, spans, counts)
    return chosen.functions.attention_summary(chosen.inputs(attention), table, counts)


@exact()
def position_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    direction: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """phi of every position, (B, H, T, N): for pictures of short contexts. Backends "torch" and "reference" only.

    Arguments and errors are those of `attention_contribution`, less the spans.
    """
    attention = check_attention(query, key, value, visibility, scale, softcap, sinks)
    check_direction(direction, (*query.shape[:3], value.shape[3]), query)
    require(backend in ("auto", "torch", "reference"), "backend", "auto, torch or reference", repr(backend))
    if backend == "reference":
        return reference.position_contribution(REFERENCE.inputs(attention), direction)
    return torch_backend.position_contribution(attention, direction)


def _over_spans(backend: str, query: Tensor, spans: Spans, counts: KeyCounts | None) -> tuple[Backend, Tensor]:
    """The backend for these queries and the span table where it wants it; the key counts, if given, are checked."""
    chosen = backend_for(backend, query)
    table = span_table(spans, query.shape[0])
    check_counts(counts, query, table)
    return chosen, chosen.table(table, query.device)
