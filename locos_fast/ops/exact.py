"""Our own sums: no gradients, and no autocast around the caller's forward pass may round them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact() -> Iterator[None]:
    """Run without gradients, and in the dtypes that are written down; also a decorator."""
    with torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def multiplied_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the matrix products of the caller's forward pass take tensors of `dtype`."""
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
