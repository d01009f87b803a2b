"""What Triton's JIT compiles and launches in an ordinary day, seen by a driver that runs nothing (`launch_path.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
CALLS = 8 * 4 * 3  # contexts, answer lengths, numbers of spans
MOST_VARIANTS = 12  # of all kernels; each is a second or more inside somebody's forward pass
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)


@pytest.fixture(scope="module")
def day():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "tests" / "kernels" / "launch_path.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_ordinary_day_compiles_few_variants(day):
    compiled = {name: len(variants) for name, variants in day.items() if variants}
    assert sum(compiled.values()) <= MOST_VARIANTS, compiled


def test_every_call_launches_its_kernels_once(day):
    launches = {name: sum(len(variant["grids"]) for variant in variants) for name, variants in day.items() if variants}
    assert launches == {
        "attention_contribution_split": CALLS,
        "attention_summary_split": CALLS,
        "combine_splits": 2 * CALLS,
        "combine_spans": CALLS,
        "span_output": CALLS,
    }


def test_multiply_adds_are_fused_in_every_kernel(day):
    """Whatever Triton's own default: it is announced to change, and a warning about it would have failed the run."""
    assert all(variant["fused"] for variants in day.values() for variant in variants)


def test_registers_are_limited_where_tiles_are_held(day):
    for name, variants in day.items():
        for variant in variants:
            assert variant["registers"] == (None if name.startswith("combine") else 240), name


def test_every_grid_is_one_that_cuda_takes(day):
    for variants in day.values():
        for variant in variants:
            for grid in variant["grids"]:
                assert all(0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=True)), grid
