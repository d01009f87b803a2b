"""What a pass costs: seconds of its parts, and on GPUs peak memory above what was there before it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


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
    peak_memory_bytes: int | None  # on its GPUs, above what was in use before; None on a CPU

    @property
    def overhead(self) -> float:
        """Scoring relative to the forward pass."""
        return self.scoring_seconds / self.forward_seconds

    def shared_by(self, prompts: int) -> Cost:
        """Of one of several prompts of the same pass; the peak memory is that of all."""
        return self._replace(
            forward_seconds=self.forward_seconds / prompts, scoring_seconds=self.scoring_seconds / prompts
        )

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
    """The most that PyTorch's allocators had handed out at once on the GPUs of `devices`, above the start, in bytes.

    `max_memory_allocated` of these GPUs starts anew. On a CPU nothing tells: the resident size of a process counts
    mapped weights when a pass first touches them, and misses what the heap kept from an earlier one.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self.gpus = sorted({d for d in devices if d.type == "cuda"}, key=str)
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self.before = sum(map(torch.cuda.memory_allocated, self.gpus))

    def bytes(self) -> int | None:
        """None without a GPU."""
        return max(0, sum(map(torch.cuda.max_memory_allocated, self.gpus)) - self.before) if self.gpus else None
