"""What produced a number: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from locos_fast._version import __version__

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: str) -> str:
    """The GPU, or the CPU with the number of threads that PyTorch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions(device: str) -> str:
    """Python, PyTorch, Triton, transformers and locos_fast; the driver's CUDA where a GPU was used."""
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    if device == "cuda":
        found.append(f"cuda {torch.version.cuda or torch.version.hip}")
    return ", ".join([*found, f"locos_fast {__version__}"])


def commit() -> str:
    """Short hash of the checkout, "+" appended if its code differs; "unknown" outside a git repository.

    Results and notes are written by the runs themselves and are no such difference.
    """
    head = _git("rev-parse", "--short", "HEAD")
    written = (":(exclude)benchmarks/results", ":(exclude)benchmarks/NOTES.md")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return f"{head}{'+' if changes else ''}" if head else "unknown"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
