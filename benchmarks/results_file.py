"""The tidy file of each suite, results/SUITE.csv: one row per provider, case and metric, appended to by every run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine
from benchmarks.measurements import UNITS, Absent, Case, Measurement, Results

COLUMNS = "provider metric unit p20 p50 p80 config device versions commit date".split()
ABSENT = "absent"  # the metric of a row without numbers; its config says why
REASON = "reason"


class Origin(NamedTuple):
    """What produced the rows of a run."""

    device: str
    versions: str
    commit: str
    date: str

    @classmethod
    def here(cls, device: str) -> Origin:
        """This machine ("cpu" or "cuda"), now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(machine.device_name(device), machine.versions(device), machine.commit(), now)

    @property
    def kind(self) -> str:
        return "cuda" if any(version.startswith("cuda ") for version in self.versions.split(", ")) else "cpu"

    def __str__(self) -> str:
        return f"{self.device}; {self.versions}; commit {self.commit}; {self.date[:10]}."


def append(folder: Path, suite: str, results: Results, origin: Origin) -> Path:
    """Append what one run found to `folder`/`suite`.csv; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{suite}.csv"
    is_new = not file.exists()
    rows = [*map(_measured, results.measurements), *map(_absent, results.absent)]
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **origin._asdict()} for row in rows)
    return file


def _measured(measurement: Measurement) -> dict[str, str]:
    numbers = {name: f"{getattr(measurement, name):.6g}" for name in ("p20", "p50", "p80")}
    return {
        "provider": measurement.provider,
        "metric": measurement.metric,
        "unit": UNITS[measurement.metric],
        **numbers,
        "config": json.dumps({} if measurement.case is None else measurement.case.config),
    }


def _absent(absent: Absent) -> dict[str, str]:
    config = absent.case.config | {REASON: absent.reason}
    return {"provider": absent.provider, "metric": ABSENT, "config": json.dumps(config)}


def latest(folder: Path, suite: str, device: str, case_of: Callable[[dict], Case]) -> tuple[Results, Origin] | None:
    """The newest rows of a device kind, put together from all runs on that machine, of those versions and commit.

    Where one thing was measured several times, the last time counts. None without rows. `case_of` is `Case.config`
    read backwards.
    """
    file = folder / f"{suite}.csv"
    if not file.exists():
        return None
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [(row, Origin(*(row[name] for name in Origin._fields))) for row in csv.DictReader(stream)]
    rows = [(row, origin) for row, origin in rows if origin.kind == device]
    if not rows:
        return None
    newest = max((origin for _, origin in rows), key=lambda origin: origin.date)
    measurements: dict[tuple, Measurement] = {}
    absent: dict[tuple, Absent] = {}
    for row, origin in rows:
        if origin[:-1] != newest[:-1]:
            continue
        config = json.loads(row["config"])
        reason = config.pop(REASON, None)
        case = case_of(config) if config else None
        if row["metric"] == ABSENT:
            absent[row["provider"], case] = Absent(row["provider"], case, reason)
        else:
            numbers = (float(row[name]) for name in ("p20", "p50", "p80"))
            found = Measurement(row["provider"], row["metric"], *numbers, case)
            measurements[found.provider, found.metric, case] = found
    measured = {(found.provider, found.case) for found in measurements.values()}
    missing = [found for key, found in absent.items() if key not in measured]
    return Results(list(measurements.values()), missing), newest
