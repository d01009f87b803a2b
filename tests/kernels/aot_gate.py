"""Ahead-of-time gate: compile every row of the tile table for every architecture, without a GPU and without torch.

    python tests/kernels/aot_gate.py [--arch sm_90 ...] [--jobs 2]

Prints one line per variant and fails on register spills, on shared memory above the architecture's limit, and where
keys or values are loaded in pieces narrower than 16 bytes although their strides allow more. Needs Triton only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `benchmarks`

from benchmarks.variants import TARGETS, Measured, measure_all, reads_tiles, tiles, variants


def failures(measured: Measured) -> list[str]:
    """What must not be."""
    limit = tiles.SHARED_MEMORY[measured.variant.arch]
    found = []
    if measured.stack:
        found.append(f"spills {measured.stack} bytes")
    if measured.shared > limit:
        found.append(f"needs {measured.shared} bytes of shared memory, the limit is {limit}")
    if reads_tiles(measured.variant.kernel) and (measured.narrow or not measured.wide):
        found.append("16-byte loads lost")
    return found


def line(measured: Measured) -> str:
    return (
        f"{measured.variant} registers={measured.registers:<4d} stack={measured.stack:<4d} "
        f"shared={measured.shared:<7d} wide={measured.wide:<3d} {'; '.join(failures(measured)) or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="compile only variants whose line contains this text")
    arguments = parser.parse_args()
    wanted = list(variants(arguments.arch, arguments.only))
    failed = 0
    for measured in measure_all(wanted, arguments.jobs):
        failed += bool(failures(measured))
        print(line(measured), flush=True)
    print(f"{len(wanted)} variants compiled with Triton {triton.__version__}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
