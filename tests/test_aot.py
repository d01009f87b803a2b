"""Every row of the tile table compiles for its architecture, without register spills and with wide loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).with_name("aot_gate.py")


@pytest.mark.slow  # some hundred variants of a second each
def test_every_kernel_compiles_for_every_architecture(tmp_path):
    pytest.importorskip("triton")
    # a cache of its own: compiled anew; and compiled rather than interpreted, whatever this process does
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, GATE], env=environment, capture_output=True, text=True)
    failing = [line for line in done.stdout.splitlines() if not line.endswith(" ok")]
    assert done.returncode == 0, "\n".join([*failing, done.stderr])
