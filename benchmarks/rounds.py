"""Whole passes timed in turns, A B C A B C ...: drift of the machine hits every provider alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import memory
from benchmarks.measurements import MEMORY, TIME, WALL, Case, Measurement
from benchmarks.timing import synchronise
from locos_fast.models.foreign_errors import is_out_of_memory

FEWEST_ROUNDS, MOST_ROUNDS = 3, 20

Run = Callable[[], object]


class Rounds(NamedTuple):
    """Per provider one entry per round; what ran out of memory is in `failed`, with the reason."""

    time: dict[str, list[float]]  # seconds, by CUDA events on a GPU
    wall: dict[str, list[float]]  # seconds
    memory: dict[str, int]  # peak bytes beyond what was allocated before the pass
    failed: dict[str, str]


def measure(runs: dict[str, Run], device: str, *, budget: float) -> Rounds:
    """Warm every provider up, then time them in turns for about `budget` seconds, at least three rounds."""
    found = Rounds({}, {}, {}, {})
    elapsed = 0.0
    for name, run in runs.items():  # first-time costs, compilation for one
        try:
            elapsed += _timed(run, device)[1]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found.failed[name] = "out of memory"
        release(device)
    working = {name: run for name, run in runs.items() if name not in found.failed}
    for _ in range(min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(budget / max(elapsed, 1e-9))))):
        for name, run in list(working.items()):
            before = memory.start_peak(device)
            try:
                seconds, wall = _timed(run, device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                found.failed[name] = "out of memory"
                del working[name]
                release(device)
                continue
            found.time.setdefault(name, []).append(seconds)
            found.wall.setdefault(name, []).append(wall)
            if device == "cuda":  # costs nothing; on a CPU it takes a pass of its own
                found.memory[name] = memory.end_peak(before)
    if device == "cpu":
        found.memory.update((name, memory.peak_extra(run, device)) for name, run in working.items())
    return found


def _timed(run: Run, device: str) -> tuple[float, float]:
    """Seconds on the device's own clock, and on the wall's."""
    synchronise(device)
    start = time.perf_counter()
    if device == "cpu":
        run()
        wall = time.perf_counter() - start
        return wall, wall
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3, time.perf_counter() - start


def measurements(rounds: Rounds, case: Case, device: str) -> list[Measurement]:
    """Time, wall time (GPU) and peak extra memory of every provider that ran."""
    found = []
    for name in rounds.time:
        found.append(Measurement.of(name, TIME, rounds.time[name], case))
        if device == "cuda":
            found.append(Measurement.of(name, WALL, rounds.wall[name], case))
        found.append(Measurement.of(name, MEMORY, [rounds.memory[name]], case))
    return found


def release(device: str) -> None:
    """Give back what a pass has left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
