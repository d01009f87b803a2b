"""Peak extra memory of one call, in bytes: what it allocates beyond its inputs, results included."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def peak_extra(run: Callable[[], object], device: str) -> int:
    """Bytes. `run` has been called before, so that nothing it keeps is counted."""
    before = start_peak(device)
    if device == "cuda":
        run()
        return end_peak(before)
    return peak_of(_cpu_allocations(run))


def start_peak(device: str) -> int:
    """Bytes allocated on a GPU before what is to be measured; see `end_peak`."""
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def end_peak(before: int) -> int:
    """Peak bytes on the GPU since `start_peak`, beyond what it returned."""
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_allocations(run: Callable[[], object]) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation of PyTorch's CPU allocator in order; bytes are negative where it frees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in changes]


def peak_of(allocations: Iterable[tuple[int, int]]) -> int:
    """Largest number of bytes alive at once; memory freed that was not allocated here counts for nothing."""
    alive: dict[int, int] = {}
    now = peak = 0
    for address, size in allocations:
        if size > 0:
            alive[address] = size
            now += size
        else:
            now -= alive.pop(address, 0)
        peak = max(peak, now)
    return peak
