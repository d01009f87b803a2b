"""Random inputs of the tensor functions, as the tests share them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast import ops
from locos_fast.ops import Contributions, Spans, Summary, Visibility

LAYOUTS = ("contiguous", "transposed", "fused", "every second", "expanded", "columns")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", device="cpu") -> Tensor:
    """A normal (B, heads, N, D) tensor in one of the memory layouts in which models hand over theirs."""
    batch, heads, n, dim = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    match layout:
        case "contiguous":
            return normal(*shape)
        case "transposed":  # (B, N, heads, D), as a projection leaves it
            return normal(batch, n, heads, dim).transpose(1, 2)
        case "fused":  # one part of a fused query-key-value projection
            fused = normal(batch, n, 3, heads, dim)
            return fused[:, :, 1].transpose(1, 2)
        case "every second":  # of the tokens
            return normal(batch, heads, 2 * n, dim)[:, :, ::2]
        case "expanded":  # one prompt, several batch rows: batch stride 0
            return normal(1, heads, n, dim).expand(shape)
        case "columns":  # last stride is not 1
            return normal(batch, heads, dim, n).mT
    raise AssertionError(layout)


class Problem(NamedTuple):
    """The arguments of the attention functions, shapes as in `locos_fast.ops`."""

    query: Tensor
    key: Tensor
    value: Tensor
    direction: Tensor
    spans: Spans
    visibility: Visibility
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def contributions(self, backend: str) -> Contributions:
        return ops.attention_contribution(*self[:6], **self.options, backend=backend)

    def summary(self, backend: str) -> Summary:
        return ops.attention_summary(*self[:3], self.spans, self.visibility, **self.options, backend=backend)

    def positions(self, backend: str) -> Tensor:
        return ops.position_contribution(*self[:4], self.visibility, **self.options, backend=backend)

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        given = (*self[:5], self.visibility.first, self.visibility.last, self.visibility.key_mask, self.sinks)
        return [x for x in given if isinstance(x, Tensor)]

    @property
    def slots(self) -> int:
        """One past the last slot that is present."""
        return self.visibility.kv_offset + self.key.shape[2]

    def only(self, b: int) -> Problem:
        """Batch row b alone."""
        first, last = self.visibility.columns(self.query.shape[0])
        offset, holes = self.visibility.kv_offset, self.visibility.key_mask
        return self._replace(
            **{name: getattr(self, name)[b : b + 1] for name in ("query", "key", "value", "direction")},
            spans=self.spans[b : b + 1] if isinstance(self.spans, Tensor) else self.spans,
            visibility=Visibility(
                first[b : b + 1] + offset, last[b : b + 1] + offset, offset, None if holes is None else holes[b : b + 1]
            ),
        )


def random_problem(
    *,
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 16,
    value_dim: int | None = None,
    rows: int = 4,
    keys: int = 67,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    spans: Spans = ((3, 11),),
    visibility: Visibility | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    device: str = "cpu",
) -> Problem:
    """Normal queries, keys, values and directions; by default the rows are the last ones."""
    value_dim = head_dim if value_dim is None else value_dim
    heads = kv_heads * group
    direction_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.arange(max(0, keys - rows), max(0, keys - rows) + rows, device=device)
    return Problem(
        random_tensor((batch, heads, rows, head_dim), dtype, layout, device),
        random_tensor((batch, kv_heads, keys, head_dim), dtype, layout, device),
        random_tensor((batch, kv_heads, keys, value_dim), dtype, layout, device),
        random_tensor((batch, heads, rows, value_dim), direction_dtype, layout, device),
        spans,
        Visibility.causal(positions) if visibility is None else visibility,
        scale,
        softcap,
        torch.randn(heads, device=device) if sinks else None,
    )


class WeightsProblem(NamedTuple):
    """The arguments of `ov_contribution`."""

    attn: Tensor
    value: Tensor
    direction: Tensor
    spans: Spans

    def contributions(self, backend: str) -> Contributions:
        return ops.ov_contribution(*self, backend=backend)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self if isinstance(x, Tensor)]


def random_weights_problem(
    *,
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 3,
    value_dim: int = 16,
    rows: int = 4,
    keys: int = 67,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    spans: Spans = ((3, 11),),
    hidden: float = 0.3,
    device: str = "cpu",
) -> WeightsProblem:
    """Softmaxed weights, of which a share `hidden` is 0, and values and directions as above."""
    heads = kv_heads * group
    attn = random_tensor((batch, heads, rows, keys), dtype, layout, device)
    plain = attn[:1] if layout == "expanded" else attn  # written to in place, so that the layout stays
    scores = plain.double().masked_fill(torch.rand(plain.shape, device=device) < hidden, -torch.inf)
    plain.copy_(scores.softmax(-1).nan_to_num(0.0))  # a row that sees nothing has no weights
    direction_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return WeightsProblem(
        attn,
        random_tensor((batch, kv_heads, keys, value_dim), dtype, layout, device),
        random_tensor((batch, heads, rows, value_dim), direction_dtype, layout, device),
        spans,
    )


def far_apart(first: Tensor, second: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same values, more than 2**31 elements between the first and the last entry along `dim`.

    An offset computed in 32 bits misses them. Both lie in one storage of little more than 2**31 elements; where memory
    is handed out lazily, only the pages written to are ever taken. The tensors may differ in their last size.
    """
    both = torch.cat([first, second], -1).transpose(0, dim).contiguous()
    size, block = both.shape[0], both[0].numel()
    gap = (2**31 // (size - 1) // 64 + 1) * 64  # a multiple of 64 keeps loads aligned
    assert gap >= block, "entries along `dim` must not overlap"
    storage = torch.empty(gap * (size - 1) + block, dtype=first.dtype, device=first.device)
    spread = storage.as_strided(both.shape, (gap, *both.stride()[1:])).copy_(both).transpose(0, dim)
    return spread[..., : first.shape[-1]], spread[..., first.shape[-1] :]
