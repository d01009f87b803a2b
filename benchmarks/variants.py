"""The kernel variants that are shipped, compiled ahead of time, and what the compiled code uses. Needs Triton only.

`tests/kernels/aot_gate.py` fails on what must not be; `benchmarks/static.py` tabulates the rest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def _shipped(module: str) -> Any:
    """A module of the folder `kernels`, under a name that no other package has: Hugging Face has a package `kernels`,
    and by way of `locos_fast` torch would be imported."""
    package = "locos_fast_kernels"
    if package not in sys.modules:
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(Path(__file__).resolve().parents[1] / "kernels")]
        sys.modules[package] = module_from_spec(spec)
    return import_module(f"{package}.{module}")


tiles = _shipped("tiles")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    name: getattr(_shipped(module), name)
    for module, names in {
        "attention_contribution": ("attention_contribution_split",),
        "attention_summary": ("attention_summary_split", "span_output"),
        "ov_contribution": ("ov_contribution_split", "combine_sums"),
        "combine": ("combine_splits",),
        "spans": ("combine_spans",),
    }.items()
    for name in names
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
LOOPED_DIMS = {("bf16", 128), ("fp16", 80), ("bf16", 256), ("bf16", 512), ("fp32", 128)}  # where "loop" is compiled
UNROLLED_SPANS = {"none": 1, "all": 16, "loop": 0}  # per set of features; "loop" has all the others too
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
    dtype: str  # of keys and values
    head_dim: int
    value_dim: int
    rows: int  # per program
    features: str  # a key of UNROLLED_SPANS

    def __str__(self) -> str:
        return (
            f"{self.arch:7s} {self.kernel:29s} {self.dtype} D={self.head_dim:<3d} Dv={self.value_dim:<3d} "
            f"rows={self.rows:<3d} features={self.features:4s}"
        )

    @property
    def itemsize(self) -> int:
        return tiles.SINGLE if self.dtype == "fp32" else tiles.HALF

    @property
    def tile(self) -> tiles.Tile:
        """The tile that the launcher takes: a pass over keys alone or values alone counts those alone, twice."""
        head_dim = self.value_dim if self.kernel == "ov_contribution_split" else self.head_dim
        value_dim = self.head_dim if self.kernel == "attention_summary_split" else self.value_dim
        return tiles.select(self.arch, self.itemsize, head_dim, value_dim, self.rows)

    @property
    def fullest(self) -> list[Variant]:
        """With the most rows of every tile that the launcher takes for some number of rows."""
        if self.kernel == "span_output":
            return [self]
        return [self._replace(rows=rows) for rows in (16, 32, 64) if self._replace(rows=rows).tile.block_m == rows]


class Measured(NamedTuple):
    """What the compiled code of a variant uses."""

    variant: Variant
    warps: int  # per program
    registers: int  # per thread; gfx942: vector registers, accumulators included
    stack: int  # bytes per thread, that is spilled registers
    shared: int  # bytes per program
    tensor_memory: int  # columns per program, of the 512 that tcgen05 works on; 0 elsewhere
    wide: int  # 16-byte loads from global memory
    narrow: int  # asynchronous copies of less than 16 bytes
    matrix: str  # matrix instructions and their shapes
    copies: str  # how tiles come into shared memory without passing through registers


def reads_tiles(kernel: str) -> bool:
    return not kernel.startswith("combine")


def variants(archs: Sequence[str], only: str = "") -> Iterator[Variant]:
    """All variants for `archs` whose text contains `only`."""
    return (variant for arch in archs for variant in _variants(arch) if only in str(variant))


def _variants(arch: str) -> Iterator[Variant]:
    for dtype, head_dim, value_dim in SHAPES:
        for kernel in filter(reads_tiles, KERNELS):
            fewest = Variant(arch, kernel, dtype, head_dim, value_dim, 16, "none")
            looped = "UNROLLED_SPANS" in KERNELS[kernel].arg_names and (dtype, head_dim) in LOOPED_DIMS
            yield fewest
            for most in fewest.fullest:
                yield from [most] if most != fewest else []
                yield most._replace(features="all")
                yield from [most._replace(features="loop")] if looped else []
    for kernel in KERNELS:
        if not reads_tiles(kernel):
            for features in ("none", "all"):
                yield Variant(arch, kernel, "bf16", 128, 128, tiles.COMBINED_ROWS, features)


def constants(variant: Variant) -> dict[str, int | bool]:
    on = variant.features != "none"
    return {
        "GROUP": 7 if on else 4,
        "HEAD_DIM": variant.head_dim,
        "VALUE_DIM": variant.value_dim,
        "SOFTCAP": on,
        "HOLES": on,
        "SINKS": on,
        "SOFTMAX": on,
        "HALVES": variant.dtype != "fp32",
        "UNROLLED_SPANS": UNROLLED_SPANS[variant.features],
        "SPLIT": tiles.SPLIT,
        "BLOCK_M": variant.rows,
        "BLOCK_N": variant.tile.block_n,
        "BLOCK_D": tiles.padded(variant.head_dim),
        "BLOCK_DV": tiles.padded(variant.value_dim),
        "LANES_D": tiles.lanes(variant.head_dim, variant.itemsize),
        "LANES_DV": (
            tiles.output_lanes(variant.value_dim, variant.itemsize)
            if variant.kernel == "span_output"
            else tiles.lanes(variant.value_dim, variant.itemsize)
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


def compile_variant(variant: Variant):
    """Triton's CompiledKernel: `.asm` by stage, `.metadata`."""
    kernel = KERNELS[variant.kernel]
    known = constants(variant)
    constexprs = {p.name: known[p.name] for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else argument_type(p.name, variant.dtype) for p in kernel.params}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, p in enumerate(kernel.params)
        if p.name.endswith("_ptr") or "_stride_" in p.name
    }
    stages = 1 if variant.kernel == "span_output" else None
    options = tiles.FUSED_MULTIPLY_ADD
    if reads_tiles(variant.kernel):
        options = variant.tile.options(variant.arch, stages=stages)
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=TARGETS[variant.arch], options=options)


def measure(variant: Variant) -> Measured:
    """Compile a variant, or take it from Triton's cache, and read what it uses."""
    read = read_amd if variant.arch.startswith("gfx") else read_nvidia
    return read(variant, compile_variant(variant))


def measure_all(wanted: Sequence[Variant], jobs: int) -> Iterator[Measured]:
    """In order, as they are done; `jobs` processes."""
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(measure, wanted)


def read_nvidia(variant: Variant, compiled) -> Measured:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)", ptx)
    sizes = [int(size, 0) for size in copies]
    return Measured(
        variant,
        warps=compiled.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,  # cuobjdump's SHARED is what the system reserves
        tensor_memory=compiled.metadata.tmem_size,
        wide=sizes.count(16) + len(re.findall(r"ld\.global[.\w]*\.v4\.b32|ld\.global[.\w]*\.v2\.b64", ptx)),
        narrow=sum(size < 16 for size in sizes),
        matrix=matrix_instructions(ptx),
        copies=asynchronous_copies(ptx),
    )


def read_amd(variant: Variant, compiled) -> Measured:
    assembly = compiled.asm["amdgcn"]
    return Measured(
        variant,
        warps=compiled.metadata.num_warps,
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        stack=int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1]),
        shared=compiled.metadata.shared,
        tensor_memory=0,
        wide=len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", assembly)),
        narrow=0,
        matrix=matrix_instructions(assembly),
        copies=asynchronous_copies(assembly),
    )


MATRIX = [  # how it is called here, and as it stands in PTX or amdgcn
    ("wgmma", r"\bwgmma\.mma_async\.[.\w]*?(m\d+n\d+k\d+)"),
    ("mma.sync", r"\bmma\.sync\.[.\w]*?(m\d+n\d+k\d+)"),
    ("tcgen05", r"\btcgen05\.mma\.[.:\w]*?kind::(\w+)"),  # the shape lies in a register
    ("mfma", r"\bv_mfma_\w*?_(\d+x\d+x\d+)"),
]
COPIES = [
    ("cp.async", r"\bcp\.async\.c[ag]\."),
    ("TMA", r"\bcp\.async\.bulk\.tensor\b"),
    ("load to LDS", r"\b(?:global|buffer)_load_(?:lds_\w+|\w+ [^\n]*\blds\b)"),
]


def matrix_instructions(assembly: str) -> str:
    """Every kind in the code with its shape, such as "mma.sync m16n8k16"; "none (fma)" where there is none."""
    found = [f"{name} {shape}" for name, pattern in MATRIX for shape in dict.fromkeys(re.findall(pattern, assembly))]
    return " + ".join(found) or "none (fma)"


def asynchronous_copies(assembly: str) -> str:
    """ "cp.async", "TMA" or "load to LDS"; "none" where everything passes through registers."""
    return " + ".join(name for name, pattern in COPIES if re.search(pattern, assembly)) or "none"
