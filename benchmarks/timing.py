"""How long one call takes, in seconds.

On a CPU: wall clock. On a GPU: CUDA events around the call, after a buffer larger than the L2 cache has been
overwritten several times, so that every byte comes from memory and the launches of the call are queued before the GPU
is free to start them; and, separately, wall clock with a synchronisation at both ends, which includes launching.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
FLUSHES = 8  # about half a millisecond, in which the host runs ahead
BUDGET = {"cpu": 6.0, "cuda": 2.0}  # seconds per provider and case
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30


@lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def flush_cache() -> None:
    """Overwrite the L2 cache, and give the host a head start."""
    for _ in range(FLUSHES):
        _flush_buffer().zero_()


def start_cold() -> None:
    """A cold L2 cache and an idle GPU."""
    flush_cache()
    torch.cuda.synchronize()


def rounds_for(run: Callable[[], object], device: str) -> int:
    """How often to time `run`, from a call whose first-time costs, compilation for one, are paid or do not matter."""
    elapsed = seconds(run, device)
    if elapsed < BUDGET[device] / FEWEST_ROUNDS or device == "cuda":
        elapsed = seconds(run, device)
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(BUDGET[device] / elapsed)))


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall clock of one call."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Time on the GPU of each of `rounds` calls with a cold L2 cache."""
    events = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush_cache()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        events.append(begin.elapsed_time(end) * 1e-3)
    return events
