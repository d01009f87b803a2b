"""What the tensor functions are given, checked: errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from locos_fast.ops.attention import Attention
from locos_fast.ops.visibility import KeyCounts, Visibility

Spans = Sequence[tuple[int, int]] | Tensor
"""Half-open (start, end) slots; or an int (B, S, 2) tensor giving each batch row its own."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def span_table(spans: Spans, batch: int) -> Tensor:
    """Check `spans` and return them as a (B or 1, S, 2) int64 tensor on the CPU (one copy from a GPU tensor)."""
    table = checked_spans(spans)
    if isinstance(spans, Tensor):
        require(len(spans) in (1, batch), "spans", f"an int ({batch}, S, 2) tensor", shape_of(spans))
    return table


def checked_spans(spans: Spans) -> Tensor:
    """`span_table` where the batch is not known yet."""
    if isinstance(spans, Tensor):
        whole = not spans.is_floating_point() and not spans.is_complex() and spans.dtype != torch.bool
        fits = spans.ndim == 3 and spans.shape[2] == 2 and whole
        require(fits, "spans", "pairs, or an int (B, S, 2) tensor", f"{shape_of(spans)} {spans.dtype}")
        table = spans.to("cpu", torch.int64)
    else:
        require(isinstance(spans, Iterable), "spans", "pairs of ints", repr(spans))
        pairs = list(spans)
        for pair in pairs:
            if not _is_int_pair(pair):
                require(False, "spans", "pairs of ints", repr(pair))
        table = torch.tensor([[(int(start), int(end)) for start, end in pairs]], dtype=torch.int64)
    require(table.shape[1] > 0, "spans", "at least one (start, end)", "none")
    flat = table.flatten(0, 1)
    wrong = (flat[:, 0] < 0) | (flat[:, 0] >= flat[:, 1])
    if bool(wrong.any()):
        require(False, "spans", "0 <= start < end", str(tuple(flat[wrong][0].tolist())))
    return table


def _is_int_pair(pair: object) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(hasattr(x, "__index__") for x in pair)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Attention:
    """Check what the three attention functions share."""
    check_rank("query", query, "(B, H, T, D)")
    batch, heads, rows, head_dim = query.shape
    check_dtype("query", query)
    check_like("key", key, (batch, None, None, head_dim), query)
    check_groups(heads, key.shape[1], "key")
    check_like("value", value, (batch, key.shape[1], key.shape[2], None), query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_filled(name, tensor)
    require(
        softcap is None or (_is_real(softcap) and softcap > 0), "softcap", "a positive number or None", repr(softcap)
    )
    require(
        scale is None or (_is_real(scale) and math.isfinite(scale)), "scale", "a finite number or None", repr(scale)
    )
    if sinks is not None:
        fits = isinstance(sinks, Tensor) and sinks.shape == (heads,)
        require(fits, "sinks", f"({heads},)", shape_of(sinks))
        check_device("sinks", sinks, query)
    check_visibility(visibility, batch, rows, key)
    scale = head_dim**-0.5 if scale is None else float(scale)
    softcap = None if softcap == math.inf else softcap  # cap * tanh(score / cap) -> score
    return Attention(query, key, value, visibility.to(query.device), scale, softcap, sinks)


def _is_real(x: object) -> bool:
    if isinstance(x, Tensor):  # a model may keep its scale as one
        return x.ndim == 0 and x.is_floating_point()
    return isinstance(x, Real) and not isinstance(x, bool)


def check_visibility(visibility: Visibility, batch: int, rows: int, key: Tensor) -> None:
    require(isinstance(visibility, Visibility), "visibility", "a Visibility", type(visibility).__name__)
    for name, bound in (("first", visibility.first), ("last", visibility.last)):
        require(
            bound.shape in ((rows,), (1, rows), (batch, rows)) and bound.dtype == torch.int64,
            f"visibility.{name}",
            f"({rows},) or ({batch}, {rows}) int64",
            f"{shape_of(bound)} {bound.dtype}",
        )
    holes = visibility.key_mask
    if holes is not None:
        expected = (batch, key.shape[2])
        require(
            holes.shape == expected and holes.dtype == torch.bool,
            "visibility.key_mask",
            f"{expected} bool",
            f"{shape_of(holes)} {holes.dtype}",
        )


def check_counts(counts: KeyCounts | None, query: Tensor, table: Tensor) -> None:
    if counts is not None:
        batch, _, rows, _ = query.shape
        expected = (batch, rows), (batch, rows, table.shape[1])
        got = tuple(counts.visible.shape), tuple(counts.span_visible.shape)
        require(got == expected, "counts", f"shapes {expected}", str(got))


def check_rank(name: str, tensor: Tensor, shape: str) -> None:
    """Check that this is a tensor with the four axes of `shape`."""
    require(isinstance(tensor, Tensor) and tensor.ndim == 4, name, shape, shape_of(tensor))


def check_dtype(name: str, tensor: Tensor) -> None:
    require(tensor.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", str(tensor.dtype))


def check_filled(name: str, tensor: Tensor) -> None:
    require(tensor.numel() > 0, name, "at least one element on every axis", shape_of(tensor))


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    require(tensor.device == like.device, name, f"a tensor on {like.device}", f"one on {tensor.device}")


def check_like(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Check rank, the sizes that are given, dtype, device and last stride."""
    fits = (
        isinstance(tensor, Tensor)
        and tensor.ndim == len(shape)
        and all(want in (None, have) for want, have in zip(shape, tensor.shape, strict=True))
    )
    expected = ", ".join("*" if size is None else str(size) for size in shape)
    require(fits, name, f"shape ({expected})", shape_of(tensor))
    require(tensor.dtype == like.dtype, name, str(like.dtype), str(tensor.dtype))
    check_device(name, tensor, like)


def check_groups(heads: int, kv_heads: int, name: str) -> None:
    fits = kv_heads > 0 and heads % kv_heads == 0
    require(fits, name, f"a number of heads that divides the {heads} query heads", str(kv_heads))


def check_direction(direction: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    require(
        isinstance(direction, Tensor) and tuple(direction.shape) == shape,
        "direction",
        f"shape {shape}",
        shape_of(direction),
    )
    wanted = (torch.float32, torch.float64) if like.dtype == torch.float64 else (torch.float32,)
    require(direction.dtype in wanted, "direction", " or ".join(map(str, wanted)), str(direction.dtype))
    check_device("direction", direction, like)


def shape_of(tensor: Any) -> str:
    """The shape, for an error message; the type of what is no tensor."""
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__


def require(condition: bool, argument: str, expected: str, got: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")
