"""python -m benchmarks.static: what the compiler says of every kernel variant, without a GPU.

Registers, shared memory and spills, how many programs therefore fit a multiprocessor (AMD: a compute unit), and which
matrix instructions and asynchronous copies the code contains. One row a variant, on the screen and in static.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks import machine
from benchmarks.variants import Measured, Variant, measure_all, variants

KB = 1024


class Multiprocessor(NamedTuple):
    """What programs share: a CUDA multiprocessor, or an AMD compute unit with its SIMDs as partitions."""

    warps: int  # most resident
    programs: int  # most resident
    shared: int  # bytes
    reserved: int  # bytes of shared memory that the system takes per program
    shared_unit: int  # bytes, of allocation
    tensor_memory: int = 0  # columns
    partitions: int = 4  # a warp lives in one
    registers: int = 512  # per partition and lane: 64 KB of 32-bit registers (AMD: 128 KB, of 64 lanes)
    register_unit: int = 8  # per lane, of allocation: 256 per warp


# CUDA C++ Programming Guide, "Compute Capabilities", and its occupancy calculator; AMD Instinct MI300 ISA guide and
# LLVM's AMDGPU back end (16 barriers per compute unit bound the programs of several warps)
LIMITS = {
    "sm_80": Multiprocessor(64, 32, 164 * KB, 1 * KB, 128),
    "sm_90": Multiprocessor(64, 32, 228 * KB, 1 * KB, 128),
    "sm_100": Multiprocessor(64, 32, 228 * KB, 1 * KB, 128, tensor_memory=512),
    "gfx942": Multiprocessor(32, 16, 64 * KB, 0, 512),
}


class Occupancy(NamedTuple):
    programs: int  # resident per multiprocessor
    share: float  # of the warps it can hold
    limited_by: str  # every resource that would have to be spared for one more program


def occupancy(arch: str, *, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> Occupancy:
    """How many programs of `warps` warps, `registers` per thread and `shared` bytes fit at a time."""
    limits = LIMITS[arch]
    fitting = {
        "registers": limits.registers // _round_up(registers, limits.register_unit) * limits.partitions // warps,
        "warps": limits.warps // warps,
        "programs": limits.programs,
    }
    if shared:
        fitting["shared memory"] = limits.shared // _round_up(shared + limits.reserved, limits.shared_unit)
    if tensor_memory:
        fitting["tensor memory"] = limits.tensor_memory // tensor_memory
    programs = min(fitting.values())
    limited_by = " and ".join(sorted(resource for resource, fit in fitting.items() if fit == programs))
    return Occupancy(programs, programs * warps / limits.warps, limited_by)


def _round_up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit


class Row(NamedTuple):
    """One row of the table and of static.csv."""

    target: str
    kernel: str
    dtype: str
    head_dim: int
    value_dim: int
    rows: int
    features: str
    warps: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    programs: int
    warp_share: float
    limited_by: str
    matrix: str
    copies: str

    @classmethod
    def of(cls, measured: Measured) -> Row:
        variant = measured.variant
        resident = occupancy(
            variant.arch,
            warps=measured.warps,
            registers=measured.registers,
            shared=measured.shared,
            tensor_memory=measured.tensor_memory,
        )
        used = (measured.warps, measured.registers, measured.shared, measured.stack)
        return cls(*variant, *used, *resident, measured.matrix, measured.copies)

    def __str__(self) -> str:
        return _line(*self._replace(warp_share=f"{self.warp_share:.0%}"))


WIDTHS = [-7, -28, -5, 4, 4, 4, -8, 5, 4, 7, 5, 8, 6, -27, -34, -8]  # negative: aligned to the left
TITLES = "target kernel dtype D Dv rows features warps regs shared stack programs %warps limited_by matrix copies"


def _line(*cells: object) -> str:
    padded = (f"{cell!s:{'<' if width < 0 else '>'}{abs(width)}}" for cell, width in zip(cells, WIDTHS, strict=True))
    return " ".join(padded).rstrip()


def sentence(target: str, rows: Sequence[Row]) -> str:
    """What the rows of one target come to."""
    matrix = _counts(row.matrix.split()[0] if row.matrix != "none (fma)" else row.matrix for row in rows)
    shares = [row.warp_share for row in rows]
    spilling = sum(row.stack_bytes > 0 for row in rows)
    return (
        f"{target}: {len(rows)} variants; matrix instructions: {matrix}; asynchronous copies: "
        f"{_counts(row.copies for row in rows)}; {min(shares):.0%} to {max(shares):.0%} of the warps resident, "
        f"limited by {_counts(row.limited_by for row in rows)}; {spilling or 'none'} with spills."
    )


def _counts(names) -> str:
    return ", ".join(f"{name} in {count}" for name, count in Counter(names).most_common())


def write(path: Path, rows: Sequence[Row], whole: Sequence[str]) -> None:
    """Put `rows` into the file; earlier rows go where their variant is among them or their target is in `whole`."""
    provenance = {
        "triton": triton.__version__,
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    new = [{column: str(cell) for column, cell in row._asdict().items()} | provenance for row in rows]
    replaced = {_variant(row) for row in new}
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if row["target"] not in whole and _variant(row) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*Row._fields, *provenance], lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(old + new, key=lambda row: list(LIMITS).index(row["target"])))


def _variant(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in Row._fields[: len(Variant._fields)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--only", default="", help="only variants whose line in `make aot` contains this text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of static.csv")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    arguments = parser.parse_args(argv)
    print(_line(*TITLES.split()))
    rows = []
    for measured in measure_all(list(variants(arguments.arch, arguments.only)), arguments.jobs):
        rows.append(Row.of(measured))
        print(rows[-1], flush=True)
    write(arguments.out / "static.csv", rows, whole=[] if arguments.only else arguments.arch)
    for target in arguments.arch:
        of_target = [row for row in rows if row.target == target]
        if of_target:
            print(sentence(target, of_target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
