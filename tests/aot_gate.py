"""Ahead-of-time gate: compile every row of the tile table for every architecture, without a GPU and without torch.

    python tests/aot_gate.py [--arch sm_90 ...] [--jobs 2]

Prints one line per variant and fails on register spills, on shared memory above the architecture's limit, and where
keys or values are loaded in pieces narrower than 16 bytes although their strides allow more. Needs Triton only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `kernels` as a namespace package: no torch is imported

from kernels import tiles
from kernels.attention_contribution import attention_contribution_split
from kernels.attention_summary import attention_summary_split, span_output
from kernels.combine import combine_splits
from kernels.ov_contribution import combine_sums, ov_contribution_split
from kernels.spans import combine_spans

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        attention_contribution_split,
        attention_summary_split,
        span_output,
        ov_contribution_split,
        combine_splits,
        combine_sums,
        combine_spans,
    )
}
# (element type, head_dim, value_dim): at least one per row of the table, with padded and unequal widths among them
SHAPES = [
    ("bf16", 128, 128),
    ("fp16", 80, 80),
    ("bf16", 256, 256),
    ("bf16", 192, 128),
    ("bf16", 512, 512),
    ("fp32", 128, 128),
    ("fp32", 256, 256),
    ("fp32", 512, 512),
]
POINTERS = {  # element type of each pointer argument; the rest are float32
    "first_ptr": "i64",
    "last_ptr": "i64",
    "hole_ptr": "u8",
    "low_ptr": "i32",
    "high_ptr": "i32",
    "start_ptr": "i32",
    "end_ptr": "i32",
    "pair_ptr": "i64",
    "split_column_ptr": "i32",
    "argmax_ptr": "i64",
}
TENSORS = ("query_ptr", "key_ptr", "value_ptr", "attn_ptr")


class Variant(NamedTuple):
    arch: str
    kernel: str
    dtype: str
    head_dim: int
    value_dim: int
    block_m: int
    features: bool

    def __str__(self) -> str:
        features = "all" if self.features else "none"
        return (
            f"{self.arch:7s} {self.kernel:29s} {self.dtype} D={self.head_dim:<3d} Dv={self.value_dim:<3d} "
            f"rows={self.block_m:<3d} features={features:4s}"
        )


class Report(NamedTuple):
    variant: Variant
    registers: int
    stack: int  # bytes of spilled registers per thread
    shared: int  # bytes
    wide: int  # 16-byte loads from global memory
    narrow: int  # asynchronous copies of less than 16 bytes

    def failures(self) -> list[str]:
        limit = tiles.SHARED_MEMORY[self.variant.arch]
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, the limit is {limit}")
        if reads_tiles(self.variant.kernel) and (self.narrow or not self.wide):
            found.append("16-byte loads lost")
        return found

    def __str__(self) -> str:
        verdict = "; ".join(self.failures()) or "ok"
        return (
            f"{self.variant} registers={self.registers:<4d} stack={self.stack:<4d} shared={self.shared:<7d} "
            f"wide={self.wide:<3d} {verdict}"
        )


def tile_of(arch: str, kernel: str, dtype: str, head_dim: int, value_dim: int) -> tiles.Tile:
    """The tile that the launcher takes: the passes over keys alone and over values alone count those alone, twice."""
    if kernel == "attention_summary_split":
        value_dim = head_dim
    if kernel == "ov_contribution_split":
        head_dim = value_dim
    return tiles.select(arch, itemsize(dtype), head_dim, value_dim)


def itemsize(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def reads_tiles(kernel: str) -> bool:
    return not kernel.startswith("combine")


def variants(archs: list[str]) -> Iterator[Variant]:
    for arch in archs:
        for dtype, head_dim, value_dim in SHAPES:
            for kernel in filter(reads_tiles, KERNELS):
                tile = tile_of(arch, kernel, dtype, head_dim, value_dim)
                most = 16 if kernel == "span_output" else tile.block_m
                for block_m, features in {(16, False), (most, False), (most, True)}:
                    yield Variant(arch, kernel, dtype, head_dim, value_dim, block_m, features)
        for kernel in KERNELS:
            if not reads_tiles(kernel):
                for features in (False, True):
                    yield Variant(arch, kernel, "bf16", 128, 128, 64, features)


def constants(variant: Variant, tile: tiles.Tile) -> dict[str, int | bool]:
    on = variant.features
    return {
        "GROUP": 7 if on else 4,
        "HEAD_DIM": variant.head_dim,
        "VALUE_DIM": variant.value_dim,
        "SOFTCAP": on,
        "HOLES": on,
        "SINKS": on,
        "TOTAL": on,
        "SOFTMAX": on,
        "HALVES": variant.dtype != "fp32",
        "LOCAL_SPANS": 16 if on else 1,
        "SPLIT": tiles.SPLIT,
        "BLOCK_M": variant.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tiles.padded(variant.head_dim),
        "BLOCK_DV": tiles.padded(variant.value_dim),
        "LANES_D": tiles.lanes(variant.head_dim, itemsize(variant.dtype)),
        "LANES_DV": (
            tiles.output_lanes(variant.value_dim, itemsize(variant.dtype))
            if variant.kernel == "span_output"
            else tiles.lanes(variant.value_dim, itemsize(variant.dtype))
        ),
        "BLOCK_S": 16,
        "BLOCK_T": 16,
    }


def argument_type(name: str, dtype: str) -> str:
    if name in TENSORS:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return f"*{POINTERS.get(name, 'fp32')}"
    return "fp32" if name in ("scale", "softcap") else "i32"


def compile_variant(variant: Variant) -> Report:
    kernel = KERNELS[variant.kernel]
    tile = tile_of(variant.arch, variant.kernel, variant.dtype, variant.head_dim, variant.value_dim)
    known = constants(variant, tile)
    constexprs = {p.name: known[p.name] for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else argument_type(p.name, variant.dtype) for p in kernel.params}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, p in enumerate(kernel.params)
        if p.name.endswith("_ptr") or "_stride_" in p.name
    }
    stages = 1 if variant.kernel == "span_output" else None
    options = tile.options(variant.arch, variant.block_m, stages=stages) if reads_tiles(variant.kernel) else {}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned),
        target=TARGETS[variant.arch],
        options=options,
    )
    measure = measure_amd if variant.arch.startswith("gfx") else measure_nvidia
    return measure(variant, compiled)


def measure_nvidia(variant: Variant, compiled) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)", compiled.asm["ptx"]
    )
    sizes = [int(size, 0) for size in copies]
    return Report(
        variant,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        wide=sizes.count(16)
        + len(re.findall(r"ld\.global[.\w]*\.v4\.b32|ld\.global[.\w]*\.v2\.b64", compiled.asm["ptx"])),
        narrow=sum(size < 16 for size in sizes),
    )


def measure_amd(variant: Variant, compiled) -> Report:
    assembly = compiled.asm["amdgcn"]
    return Report(
        variant,
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        stack=4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
        shared=compiled.metadata.shared,
        wide=len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", assembly)),
        narrow=0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="compile only variants whose line contains this text")
    arguments = parser.parse_args()
    wanted = [v for v in variants(arguments.arch) if arguments.only in str(v)]
    failed = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for report in pool.map(compile_variant, wanted):
            failed += bool(report.failures())
            print(report, flush=True)
    print(f"{len(wanted)} variants compiled with Triton {triton.__version__}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
