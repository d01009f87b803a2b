"""How long one call takes, in seconds.

On a CPU: wall clock. On a GPU: CUDA events around the call, after a buffer larger than the L2 cache has been
overwritten several times and another one read, so that every byte comes from memory, nothing is left to be written back
and the launches of the call are queued before the GPU is free to start them; separately, the call's Triton kernels
alone, as the profiler sees them; and wall clock with a synchronisation at both ends, which includes launching.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
FLUSHES = 8  # about half a millisecond, in which the host runs ahead
READS = 2
BUDGET = {"cpu": 6.0, "cuda": 2.0}  # seconds per provider and case
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30


@lru_cache(maxsize=1)
def _flush_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    """One to write, one to read."""
    return tuple(torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda") for _ in range(2))


def flush_cache() -> None:
    """Empty the L2 cache, and give the host a head start.

    What was written last would lie in the cache, and be written to memory while the call is timed; reads evict it.
    """
    written, read = _flush_buffers()
    for _ in range(FLUSHES):
        written.zero_()
    for _ in range(READS):
        read.sum()


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


def kernel_seconds(run: Callable[[], object], rounds: int, kernels: Sequence[str]) -> list[float]:
    """Time on the GPU of the `kernels` of each of `rounds` calls with a cold L2 cache; nothing if there are none."""
    if not kernels:
        return []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            start_cold()
            run()
            torch.cuda.synchronize()
    return per_call(((event.name, event.time_range.elapsed_us() * 1e-6) for event in profiler.events()), kernels)


def per_call(timed: Iterable[tuple[str, float]], kernels: Sequence[str]) -> list[float]:
    """The sum over `kernels`, each launched once a call, for every call; `timed` may hold other kernels too.

    Nothing where the profiler did not see each of them equally often: a sum would mix calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for name, elapsed in timed:
        if name in seconds:
            seconds[name].append(elapsed)
    if len({len(found) for found in seconds.values()}) != 1:
        return []
    return [sum(call) for call in zip(*seconds.values(), strict=True)]
