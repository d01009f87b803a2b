"""How the rows and keys of a call are cut into the programs of a Triton launch."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.kernels import tiles


@lru_cache
def architecture(device: torch.device) -> str:
    """The rows of the tile table for a device; those of the interpreter where Triton interprets."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    amd = torch.version.hip is not None
    return tiles.architecture(*torch.cuda.get_device_capability(device), amd=amd)


class Grid(NamedTuple):
    """The rows of a key/value head (group x answer steps) in blocks, the keys in splits."""

    arch: str
    tile: tiles.Tile
    batch: int
    kv_heads: int
    group: int  # query heads per key/value head
    steps: int  # T
    splits: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Grid:
        """For rows (B, H, T, any) over keys and values (B, Hkv, N, D), of which a pass over one reads only that."""
        batch, heads, steps = query.shape[:3]
        kv_heads, n_keys = key.shape[1:3]
        arch = architecture(query.device)
        group = heads // kv_heads
        tile = tiles.select(arch, query.element_size(), key.shape[-1], value.shape[-1], group * steps)
        return cls(arch, tile, batch, kv_heads, group, steps, -(-n_keys // tiles.SPLIT))

    @property
    def block_m(self) -> int:
        return self.tile.rows(self.group * self.steps)

    @property
    def row_blocks(self) -> int:
        return -(-self.group * self.steps // self.block_m)

    @property
    def rows(self) -> int:
        """Per key/value head, padding rows included."""
        return self.row_blocks * self.block_m

    @property
    def programs(self) -> tuple[int, int, int]:
        """Of a pass over the keys."""
        return self.row_blocks, self.batch * self.kv_heads, self.splits

    @property
    def combining(self) -> tuple[int, int]:
        """Programs of a kernel that combines the splits."""
        return self.rows // tiles.COMBINED_ROWS, self.batch * self.kv_heads

    @property
    def constants(self) -> dict[str, int]:
        """What every pass over the keys is compiled for."""
        return {
            "GROUP": self.group,
            "SPLIT": tiles.SPLIT,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.tile.block_n,
            **self.tile.options(self.arch),
        }


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on the tensors' own GPU, which under a device map is not always the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def strides(*tensors: Tensor) -> list[int]:
    """The first three strides of each (B, heads, length, D) tensor; the last one is 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def readable(tensor: Tensor) -> Tensor:
    """The kernels read any strides in place but the last; a transposed head_dim is copied."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
