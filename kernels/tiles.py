"""The tile table: how much of the keys one program holds at a time, per architecture, element size and bytes per key.

A fixed table instead of autotuning: the same inputs give the same bits on the same architecture, and no user process
stops to time candidates. `tests/kernels/aot_gate.py` compiles every row for its architecture and fails on register
spills, on shared memory above the limit and on narrow loads. benchmarks/NOTES.md says which rows were timed.
"""

from __future__ import annotations

from typing import NamedTuple

SPLIT = 512  # keys per program. Fixed in tokens, never derived from the batch: a row's bits do not depend on it

MOST_REGISTERS = 240  # per thread, of the 255 a thread can have


# A product and a sum are one instruction, rounded once, whatever a Triton release does by default: the same bits.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}

COMBINED_ROWS = 16  # rows per program of the kernels that combine partial results, whatever the first kernel took


class Tile(NamedTuple):
    block_m: int  # most rows (query heads of a group x answer steps) per program
    block_n: int  # keys per tile
    num_warps: int  # warps per program
    num_stages: int  # tiles in flight

    def options(self, arch: str, *, stages: int | None = None) -> dict[str, int]:
        """Launch options. On NVIDIA a register limit keeps ptxas from spilling a few words to reach more occupancy."""
        limit = {"maxnreg": MOST_REGISTERS} if arch.startswith("sm_") else {}
        return {"num_warps": self.num_warps, "num_stages": stages or self.num_stages} | limit | FUSED_MULTIPLY_ADD

    def rows(self, rows: int) -> int:
        """Rows per program for `rows` rows in all: a power of two, at least the 16 of one matrix instruction."""
        return min(self.block_m, max(16, next_power_of_two(rows)))


HALF, SINGLE = 2, 4  # bytes per element

# {architecture: {bytes per element: {up to so many bytes of key and value per token: tiles, fewest rows first}}}
# 64 rows of 64 keys do not fit the registers of four warps; 64 rows of 32 keys do, and leave room for a second program
TILES: dict[str, dict[int, dict[int, tuple[Tile, ...]]]] = {
    "sm_80": {
        HALF: {512: (Tile(32, 64, 4, 2),), 1024: (Tile(16, 32, 8, 2),), 2048: (Tile(16, 16, 8, 2),)},
        SINGLE: {4096: (Tile(16, 32, 4, 1),)},
    },
    "sm_89": {
        HALF: {512: (Tile(32, 32, 4, 2),), 1024: (Tile(16, 32, 8, 2),), 2048: (Tile(16, 16, 8, 2),)},
        SINGLE: {4096: (Tile(16, 32, 4, 1),)},
    },
    "sm_90": {
        HALF: {512: (Tile(32, 64, 4, 3), Tile(64, 32, 4, 3)), 1024: (Tile(16, 32, 8, 3),), 2048: (Tile(16, 16, 8, 2),)},
        SINGLE: {4096: (Tile(16, 32, 4, 1),)},
    },
    "sm_100": {
        HALF: {512: (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)), 1024: (Tile(16, 32, 8, 3),), 2048: (Tile(16, 16, 8, 2),)},
        SINGLE: {4096: (Tile(16, 32, 4, 1),)},
    },
    "gfx942": {
        HALF: {512: (Tile(32, 64, 4, 1), Tile(64, 64, 8, 1)), 1024: (Tile(16, 32, 8, 1),), 2048: (Tile(16, 32, 8, 1),)},
        SINGLE: {4096: (Tile(16, 32, 4, 1),)},
    },
    "interpreter": {
        HALF: {4096: (Tile(32, 32, 4, 1),)},
        SINGLE: {4096: (Tile(32, 32, 4, 1),)},
    },
}

SHARED_MEMORY = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes


def architecture(major: int, minor: int, *, amd: bool = False) -> str:
    """The row of the table for a CUDA compute capability (AMD: any, only gfx942 is listed)."""
    if amd:
        return "gfx942"
    if (major, minor) == (8, 0):
        return "sm_80"
    if major == 9:
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_89"  # the smallest shared memory is safe everywhere


def select(arch: str, itemsize: int, head_dim: int, value_dim: int, rows: int) -> Tile:
    """The tile for one problem of `rows` rows; raises ValueError when a key is wider than the table."""
    bytes_per_key = (padded(head_dim) + padded(value_dim)) * itemsize
    for limit, tiles in TILES[arch][itemsize].items():
        if bytes_per_key <= limit:
            return next((tile for tile in tiles if rows <= tile.block_m), tiles[-1])
    raise ValueError(f"head_dim: expected at most 512 per key and per value, got {head_dim} and {value_dim}")


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(head_dim: int) -> int:
    """Width of a tile: Triton's tiles are powers of two, the rest is masked and never loaded."""
    return max(16, next_power_of_two(head_dim))


def lanes(head_dim: int, itemsize: int) -> int:
    """Lanes of a vector that one product takes at a time: all of them while they fit the registers."""
    if itemsize == HALF:
        return padded(head_dim) if head_dim <= 256 else 128
    return min(padded(head_dim), 32)  # no matrix instructions: operands are held by every thread


def output_lanes(value_dim: int, itemsize: int) -> int:
    """Lanes of a head output that one program accumulates."""
    return min(padded(value_dim), 128 if itemsize == HALF else 64)
