"""The tensors of one case: random inputs, and what a model would hand to a scorer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.geometries import Case
from locos_fast.ops import Visibility
from locos_fast.ops.visibility import KeyCounts, count_keys

CHUNK = 65_536  # keys at a time when the float32 scores of the head output are computed


class Problem:
    """Random tensors of a `Case` on a device. What only some providers read is computed when first asked for."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, torch.device(device)
        geometry = case.geometry
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(heads: int, length: int) -> Tensor:
            shape = (1, heads, length, geometry.head_dim)
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

        self.query = normal(geometry.heads, case.rows).to(case.dtype)  # (1, H, T, D)
        self.key = normal(geometry.kv_heads, case.n_keys).to(case.dtype)  # (1, Hkv, N, D)
        self.value = normal(geometry.kv_heads, case.n_keys).to(case.dtype)  # (1, Hkv, N, D)
        self.direction = normal(geometry.heads, case.rows) / geometry.head_dim**0.5  # (1, H, T, D) float32
        positions = torch.arange(case.first_row, case.n_keys, device=self.device)
        self.visibility = Visibility.causal(positions, window=geometry.window)
        self.spans = [case.needle]
        self.scale = geometry.head_dim**-0.5
        self.block_mask: object = None  # of flex_attention

    @property
    def group(self) -> int:
        return self.case.geometry.heads // self.case.geometry.kv_heads

    def stacked(self, x: Tensor) -> Tensor:
        """The rows that share a key/value head side by side: (1, H, T, x) -> (1, Hkv, G*T, x)."""
        return x.reshape(1, self.case.geometry.kv_heads, self.group * self.case.rows, x.shape[-1])

    @cached_property
    def visible(self) -> Tensor:
        """(1, T) int64 number of keys each row sees."""
        return (self.visibility.last - self.visibility.first.clamp_min(0))[None]

    @cached_property
    def counts(self) -> KeyCounts:
        """Keys that each row sees, in all and in the needle: one forward pass counts them once for all layers."""
        return count_keys(self.visibility, torch.tensor([self.spans], device=self.device), 1, self.case.n_keys)

    @property
    def attention(self) -> dict[str, Any]:
        """The arguments that the functions of attention share."""
        names = ("query", "key", "value", "spans", "visibility", "counts")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def attn(self) -> Tensor:
        """(1, H, T, N) attention weights in the model's dtype."""
        scores = self.query.new_empty((1, self.case.geometry.heads, self.case.rows, self.case.n_keys)).float()
        rows = self.stacked(self.query).float() * self.scale
        for start in range(0, self.case.n_keys, CHUNK):
            part = rows @ self.key[:, :, start : start + CHUNK].float().mT
            scores[..., start : start + CHUNK] = part.reshape(*scores.shape[:3], -1)
        scores.masked_fill_(~self.visibility.mask(1, self.case.n_keys)[:, None], -torch.inf)
        return scores.softmax(-1).to(self.case.dtype)

    @cached_property
    def output(self) -> Tensor:
        """(1, H, T, D) head output in the model's dtype: the model computes it whether or not anyone scores heads."""
        output = self.stacked(self.query).float() * 0
        attn = self.stacked(self.attn)
        for start in range(0, self.case.n_keys, CHUNK):
            part = slice(start, start + CHUNK)
            output += attn[..., part].float() @ self.value[:, :, part].float()
        return output.to(self.case.dtype).reshape(self.query.shape)

    @cached_property
    def row_mask(self) -> Tensor:
        """(1, 1, G*T, keys seen) bool for rows stacked per key/value head, over the columns some row sees."""
        mask = self.visibility.mask(1, self.case.n_keys)[:, None, :, self.case.first_key :]
        return mask.repeat(1, 1, self.group, 1)
