"""Measured numbers and the tidy file they are appended to: one row per provider, case and metric."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.geometries import Case

TIME, WALL, MEMORY, BANDWIDTH = "time", "wall_time", "peak_extra_memory", "bandwidth"
UNITS = {TIME: "s", WALL: "s", MEMORY: "bytes", BANDWIDTH: "bytes/s"}
COLUMNS = "provider metric unit p20 p50 p80 config device versions commit date".split()
FILE_NAME = "kernels.csv"


class Measurement(NamedTuple):
    provider: str
    metric: str
    p20: float
    p50: float
    p80: float
    case: Case | None = None  # None for the machine's own bandwidth

    @classmethod
    def of(cls, provider: str, metric: str, samples: Sequence[float], case: Case | None = None) -> Measurement:
        return cls(provider, metric, *map(float, np.percentile(samples, (20, 50, 80))), case)


class Absent(NamedTuple):
    """A provider that could not run a case, and why."""

    provider: str
    case: Case
    reason: str


def append(folder: Path, measurements: Iterable[Measurement], device: str) -> Path:
    """Append the measurements of one run to `folder`/kernels.csv; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    is_new = not file.exists()
    same = {
        "device": machine.device_name(device),
        "versions": machine.versions(device),
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows({**_row(measurement), **same} for measurement in measurements)
    return file


def _row(measurement: Measurement) -> dict[str, str]:
    numbers = {name: f"{getattr(measurement, name):.6g}" for name in ("p20", "p50", "p80")}
    config = {} if measurement.case is None else measurement.case.config
    return {
        "provider": measurement.provider,
        "metric": measurement.metric,
        "unit": UNITS[measurement.metric],
        **numbers,
        "config": json.dumps(config),
    }
