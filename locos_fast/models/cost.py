"""What a pass costs: seconds of its parts, and peak memory above what was there before it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KIB = 1024


class Stopwatch:
    """Adds up the seconds of what runs inside `running()`.

    On a GPU by events on its stream, so that nothing waits for it until `seconds` is read; elsewhere by the wall clock.
    """

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time the work that is given to `device` inside the context."""
        if device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self._elapsed += time.perf_counter() - start
            return
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
        self._events.append((begin, end))

    @property
    def seconds(self) -> float:
        """Waits for the GPU."""
        for _, end in self._events:
            end.synchronize()
        return self._elapsed + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3


def timed(watch: Stopwatch | None, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`watch.running(device)`, or nothing if nobody watches."""
    return contextlib.nullcontext() if watch is None else watch.running(device)


class Cost(NamedTuple):
    """One pass that scores heads."""

    forward_seconds: float  # the model's own share of the pass
    scoring_seconds: float  # what scoring adds: in every layer, and after the pass
    peak_memory_bytes: int | None  # above what was in use before, weights included; None where it cannot be told

    @property
    def overhead(self) -> float:
        """Scoring relative to the forward pass."""
        return self.scoring_seconds / self.forward_seconds

    def as_dict(self) -> dict[str, float | int | None]:
        """For `meta` and JSON."""
        return {**self._asdict(), "overhead": self.overhead}


class Meter:
    """Measures one pass, from its making to `cost()`."""

    def __init__(self, model: nn.Module) -> None:
        self.devices = {parameter.device for parameter in model.parameters()}
        self.scoring = Stopwatch()
        self.memory = PeakMemory(self.devices)
        self._wait()
        self.start = time.perf_counter()

    def cost(self) -> Cost:
        self._wait()
        whole = time.perf_counter() - self.start
        scoring = min(self.scoring.seconds, whole)
        return Cost(max(whole - scoring, 1e-9), scoring, self.memory.bytes())

    def _wait(self) -> None:
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory that was in use, above what was in use at the start, in bytes.

    CUDA: what PyTorch's allocator handed out, summed over `devices`. CPU: the resident size of the process, which Linux
    alone lets one reset. Either way the counters of the process start anew (`max_memory_allocated`, `VmHWM`).
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self.gpus = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self.on_cpu = not self.gpus
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self.before = self._in_use()

    def _in_use(self) -> int | None:
        if not self.on_cpu:
            return sum(torch.cuda.memory_allocated(gpu) for gpu in self.gpus)
        try:
            CLEAR.write_text("5")  # the peak becomes the present
            return _status("VmRSS")
        except (OSError, StopIteration):
            return None

    def bytes(self) -> int | None:
        """None on a CPU without Linux's /proc."""
        if self.before is None:
            return None
        peak = sum(map(torch.cuda.max_memory_allocated, self.gpus)) if self.gpus else _status("VmHWM")
        return max(0, peak - self.before)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * KIB
