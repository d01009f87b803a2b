"""What a call asks of a GPU, without one: kernels are replaced by counters, operators seen on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from locos_fast.ops import triton_backend, triton_grid, triton_partials

KERNELS = {
    "attention_contribution_split": triton_backend,
    "attention_summary_split": triton_backend,
    "ov_contribution_split": triton_backend,
    "span_output": triton_backend,
    "combine_spans": triton_partials,
    "combine_splits": triton_partials,
    "combine_sums": triton_partials,
}
# what PyTorch answers on the host, without work for the device
FREE = ("empty", "view", "expand", "slice", "select", "unbind", "detach", "transpose", "alias", "permute", "unsqueeze")


class Counter:
    """Stands for a kernel: kernel[grid](...)."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Counter:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.launched.append(self.name)


class Operators(TorchDispatchMode):
    """Lists the operators that would do work on the device."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0].strip("_")
        tensors = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
        if any(x.device.type == "meta" for x in tensors) and not name.startswith(FREE):
            self.launched.append(name)
        return result


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace every kernel; what is launched from now on, in order. Operators are added under `Operators(list)`."""
    found: list[str] = []
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Counter(name, found))
    monkeypatch.setattr(triton_grid, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch, "empty", unpoisoned(torch.empty))
    return found


def unpoisoned(allocate: Any) -> Any:
    """Without the NaNs that tests fill empty memory with: they would be counted."""
    return getattr(allocate, "__wrapped__", allocate)
