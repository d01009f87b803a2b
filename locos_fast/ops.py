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

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from locos_fast import reference, torch_ops
from locos_fast.contributions import Contributions, Summary
from locos_fast.exact import exact
from locos_fast.visibility import KeyCounts, Visibility

__all__ = [
    "Contributions",
    "Spans",
    "Summary",
    "Visibility",
    "attention_contribution",
    "attention_summary",
    "ov_contribution",
    "position_contribution",
]

Spans = Sequence[tuple[int, int]] | Tensor
"""Half-open (start, end) slots; or an int (B, S, 2) tensor giving each batch row its own."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@exact()
def ov_contribution(
    attn: Tensor,
    value: Tensor,
    direction: Tensor,
    spans: Spans,
    *,
    visible: Tensor | None = None,
    backend: str = "auto",
) -> Contributions:
    """Sum phi over spans of keys, from given attention weights and values; no head output is formed.

    attn: (B, H, T, N) softmaxed weights. value: (B, Hkv, N, Dv). direction: (B, H, T, Dv) float32, usually
    W_O[h]^T d_y: then the sums are logits. spans: columns of `attn`; they may overlap and are summed separately.
    visible: (B, T) int64 number of keys each row could see; N where it is not given.

    Raises ValueError for shapes, dtypes, devices, spans and backends that do not fit.
    """
    _require(attn.ndim == 4, "attn", "(B, H, T, N)", _shape(attn))
    batch, heads, rows, n_keys = attn.shape
    _check_dtype("attn", attn)
    _check_like("value", value, (batch, None, n_keys, None), attn)
    _check_groups(heads, value.shape[1], "value")
    _check_direction(direction, (batch, heads, rows, value.shape[3]), attn)
    for name, tensor in (("attn", attn), ("value", value)):
        _check_filled(name, tensor)
    if visible is not None:
        _require(
            visible.shape == (batch, rows) and visible.dtype == torch.int64,
            "visible",
            f"({batch}, {rows}) int64",
            f"{_shape(visible)} {visible.dtype}",
        )
        _check_device("visible", visible, attn)
    implementation = _implementation(backend, attn)
    table = _placed(span_table(spans, batch), attn, implementation)
    if implementation is reference:
        attn, value = (x.to(reference.result_dtype(x)) for x in (attn, value))
    return cast(Contributions, implementation.ov_contribution(attn, value, direction, table, visible=visible))


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
    backend: str = "auto",
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
    checked = _check_attention(query, key, value, visibility, scale, softcap, sinks)
    _check_direction(direction, (*query.shape[:3], value.shape[3]), query)
    implementation = _implementation(backend, query)
    table = _placed(span_table(spans, query.shape[0]), query, implementation)
    _check_counts(counts, query, table)
    if implementation is reference:
        query, key, value = (x.to(reference.result_dtype(x)) for x in (query, key, value))
    return cast(
        Contributions,
        implementation.attention_contribution(query, key, value, direction, table, counts=counts, **checked),
    )


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
    backend: str = "auto",
) -> Summary:
    """The lean path of scoring: one pass over the keys; values are read only inside the spans.

    Arguments and errors are those of `attention_contribution`, less the direction. Because the sum of phi over all keys
    is direction . head output, which a model computes anyway, a `Summary` and the head output together give every sum
    of `attention_contribution` for any direction chosen afterwards.
    """
    checked = _check_attention(query, key, value, visibility, scale, softcap, sinks)
    implementation = _implementation(backend, query)
    table = _placed(span_table(spans, query.shape[0]), query, implementation)
    _check_counts(counts, query, table)
    if implementation is reference:
        query, key, value = (x.to(reference.result_dtype(x)) for x in (query, key, value))
    return cast(Summary, implementation.attention_summary(query, key, value, table, counts=counts, **checked))


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
    backend: str = "auto",
) -> Tensor:
    """phi of every position, (B, H, T, N): for pictures of short contexts. Backends "torch" and "reference" only.

    Arguments and errors are those of `attention_contribution`, less the spans.
    """
    checked = _check_attention(query, key, value, visibility, scale, softcap, sinks)
    _check_direction(direction, (*query.shape[:3], value.shape[3]), query)
    _require(backend in ("auto", "torch", "reference"), "backend", "auto, torch or reference", repr(backend))
    if backend == "reference":
        query, key, value = (x.to(reference.result_dtype(x)) for x in (query, key, value))
        return reference.position_contribution(query, key, value, direction, **checked)
    return torch_ops.position_contribution(query, key, value, direction, **checked)


def span_table(spans: Spans, batch: int) -> Tensor:
    """Check `spans` and return them as a (B or 1, S, 2) int64 tensor on the CPU (one copy from a GPU tensor)."""
    table = checked_spans(spans)
    if isinstance(spans, Tensor):
        _require(len(spans) in (1, batch), "spans", f"an int ({batch}, S, 2) tensor", _shape(spans))
    return table


def checked_spans(spans: Spans) -> Tensor:
    """`span_table` where the batch is not known yet."""
    if isinstance(spans, Tensor):
        fits = spans.ndim == 3 and spans.shape[2] == 2 and not spans.is_floating_point()
        _require(fits, "spans", "pairs, or an int (B, S, 2) tensor", f"{_shape(spans)} {spans.dtype}")
        table = spans.to("cpu", torch.int64)
    else:
        pairs = list(spans)
        for pair in pairs:
            if not _is_int_pair(pair):
                _require(False, "spans", "pairs of ints", repr(pair))
        table = torch.tensor([[(int(start), int(end)) for start, end in pairs]], dtype=torch.int64)
    _require(table.shape[1] > 0, "spans", "at least one (start, end)", "none")
    flat = table.flatten(0, 1)
    wrong = (flat[:, 0] < 0) | (flat[:, 0] >= flat[:, 1])
    if bool(wrong.any()):
        _require(False, "spans", "0 <= start < end", str(tuple(flat[wrong][0].tolist())))
    return table


def _placed(table: Tensor, like: Tensor, implementation: ModuleType) -> Tensor:
    """The table where the backend wants it: Triton's launcher plans on the host and never waits for the device."""
    return table.to(like.device) if implementation in (reference, torch_ops) else table


def _is_int_pair(pair: object) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(hasattr(x, "__index__") for x in pair)


def triton_available() -> bool:
    """Whether the Triton kernels can be imported here."""
    return importlib.util.find_spec("triton") is not None


def chosen_backend(backend: str, tensor: Tensor) -> str:
    """The name of the backend that would work on `tensor`; raises ValueError as every function here does."""
    return _implementation(backend, tensor).__name__.rpartition(".")[2].removesuffix("_ops")


def _implementation(backend: str, tensor: Tensor) -> ModuleType:
    on_gpu = tensor.device.type == "cuda"  # ROCm devices call themselves cuda too
    if backend == "auto":
        backend = "triton" if on_gpu and triton_available() and tensor.dtype != torch.float64 else "torch"
    if backend == "torch":
        return torch_ops
    if backend == "reference":
        return reference
    _require(backend == "triton", "backend", "auto, triton, torch or reference", repr(backend))
    _require(triton_available(), "backend", "an installed Triton for 'triton'", "none")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    _require(on_gpu or interpreted, "backend", "a GPU (or TRITON_INTERPRET=1) for 'triton'", f"{tensor.device}")
    _require(tensor.dtype != torch.float64, "backend", "float16, bfloat16 or float32 for 'triton'", "float64")
    from locos_fast import triton_ops

    return triton_ops


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> dict:
    """Check what the three attention functions share; returns their keyword arguments."""
    _require(query.ndim == 4, "query", "(B, H, T, D)", _shape(query))
    batch, heads, rows, head_dim = query.shape
    _check_dtype("query", query)
    _check_like("key", key, (batch, None, None, head_dim), query)
    _check_groups(heads, key.shape[1], "key")
    _check_like("value", value, (batch, key.shape[1], key.shape[2], None), query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_filled(name, tensor)
    _require(softcap is None or softcap > 0, "softcap", "a positive number or None", repr(softcap))
    if sinks is not None:
        _require(sinks.shape == (heads,), "sinks", f"({heads},)", _shape(sinks))
        _check_device("sinks", sinks, query)
    _check_visibility(visibility, batch, rows, key)
    return {
        "visibility": visibility.to(query.device),
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "softcap": softcap,
        "sinks": sinks,
    }


def _check_visibility(visibility: Visibility, batch: int, rows: int, key: Tensor) -> None:
    for name, bound in (("first", visibility.first), ("last", visibility.last)):
        _require(
            bound.shape in ((rows,), (1, rows), (batch, rows)) and bound.dtype == torch.int64,
            f"visibility.{name}",
            f"({rows},) or ({batch}, {rows}) int64",
            f"{_shape(bound)} {bound.dtype}",
        )
    holes = visibility.key_mask
    if holes is not None:
        expected = (batch, key.shape[2])
        _require(
            holes.shape == expected and holes.dtype == torch.bool,
            "visibility.key_mask",
            f"{expected} bool",
            f"{_shape(holes)} {holes.dtype}",
        )


def _check_counts(counts: KeyCounts | None, query: Tensor, table: Tensor) -> None:
    if counts is not None:
        batch, _, rows, _ = query.shape
        expected = (batch, rows), (batch, rows, table.shape[1])
        got = tuple(counts.visible.shape), tuple(counts.span_visible.shape)
        _require(got == expected, "counts", f"shapes {expected}", str(got))


def _check_dtype(name: str, tensor: Tensor) -> None:
    _require(tensor.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", str(tensor.dtype))


def _check_filled(name: str, tensor: Tensor) -> None:
    _require(tensor.numel() > 0, name, "at least one element on every axis", _shape(tensor))


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    _require(tensor.device == like.device, name, f"a tensor on {like.device}", f"one on {tensor.device}")


def _check_like(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Check rank, the sizes that are given, dtype, device and last stride."""
    fits = tensor.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    expected = ", ".join("*" if size is None else str(size) for size in shape)
    _require(fits, name, f"shape ({expected})", _shape(tensor))
    _require(tensor.dtype == like.dtype, name, str(like.dtype), str(tensor.dtype))
    _check_device(name, tensor, like)


def _check_groups(heads: int, kv_heads: int, name: str) -> None:
    fits = kv_heads > 0 and heads % kv_heads == 0
    _require(fits, name, f"a number of heads that divides the {heads} query heads", str(kv_heads))


def _check_direction(direction: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _require(tuple(direction.shape) == shape, "direction", f"shape {shape}", _shape(direction))
    wanted = (torch.float32, torch.float64) if like.dtype == torch.float64 else (torch.float32,)
    _require(direction.dtype in wanted, "direction", " or ".join(map(str, wanted)), str(direction.dtype))
    _check_device("direction", direction, like)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _require(condition: bool, argument: str, expected: str, got: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")
