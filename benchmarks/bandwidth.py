"""What the machine's memory can deliver, measured in the same run as everything else, in bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.timing import device_seconds

SIZE = {"cpu": 512 << 20, "cuda": 4 << 30}  # bytes: far more than any cache holds
ROUNDS = 7


class Bandwidth(NamedTuple):
    copy: list[float]  # bytes read plus bytes written per second, one entry per round
    read: list[float]  # bytes read per second by a sum


def measure(device: str) -> Bandwidth:
    source = torch.ones(SIZE[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = source.nbytes
    copied = _seconds(lambda: target.copy_(source), device)
    read = _seconds(lambda: source.sum(), device)
    return Bandwidth([2 * size / s for s in copied], [size / s for s in read])


def _seconds(run: Callable[[], object], device: str) -> list[float]:
    run()
    if device == "cuda":
        return device_seconds(run, ROUNDS)
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds
