"""Every row of the tile table compiles for its architecture, without register spills and with wide loads.

The one test of the ordinary run that takes minutes: nothing else says, without a GPU, that a kernel compiles at all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).with_name("aot_gate.py")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # `make aot` compiles for sm_89 too


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_and_with_wide_loads(tmp_path, target):
    pytest.importorskip("triton")
    # a cache of its own: compiled anew; and compiled rather than interpreted, whatever this process does
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, GATE, "--arch", target, "--jobs", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    failing = [line for line in done.stdout.splitlines() if not line.endswith(" ok")]
    assert done.returncode == 0, "\n".join([*failing, done.stderr])
