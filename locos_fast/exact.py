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
