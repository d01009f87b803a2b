"""Measured numbers: one per provider, case and metric, of any suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

TIME, WALL, MEMORY, BANDWIDTH = "time", "wall_time", "peak_extra_memory", "bandwidth"
KERNELS = "kernel_time"  # of a provider's Triton kernels alone
OVERHEAD, RATIO = "overhead", "ratio"
RATE, OVER, PASSED = "trials_per_minute", "packed_over", "passed"  # of scans
OVERLAP, SPEARMAN = "top10_overlap", "spearman"  # of two scans' heads: no timings
UNITS = {
    TIME: "s",
    WALL: "s",
    KERNELS: "s",
    MEMORY: "bytes",
    BANDWIDTH: "bytes/s",
    OVERHEAD: "fraction",
    RATIO: "times",
    RATE: "1/min",
    OVER: "times",
    PASSED: "share",
    OVERLAP: "share",
    SPEARMAN: "correlation",
}


class Case(Protocol):
    """What was run: equal cases are the same row of a table."""

    @property
    def label(self) -> str: ...

    @property
    def config(self) -> dict[str, int | str | None]:
        """The case as it is written to the results file."""
        ...


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


class Results(NamedTuple):
    """Everything one run of a suite measured."""

    measurements: list[Measurement]
    absent: list[Absent]

    def find(self, provider: str, case: Case | None, metric: str) -> Measurement | None:
        """None where it was not measured."""
        for found in self.measurements:
            if (found.provider, found.case, found.metric) == (provider, case, metric):
                return found
        return None

    def median(self, provider: str, case: Case | None, metric: str) -> float | None:
        found = self.find(provider, case, metric)
        return None if found is None else found.p50

    def ratio(self, over: str, under: str, case: Case, metric: str = TIME) -> float | None:
        """Median of one provider over that of another; None unless both were measured."""
        numerator, denominator = (self.median(name, case, metric) for name in (over, under))
        return None if numerator is None or denominator is None else numerator / denominator

    def reason_absent(self, provider: str, case: Case) -> str | None:
        return next((a.reason for a in self.absent if (a.provider, a.case) == (provider, case)), None)

    @property
    def cases(self) -> list:
        """Every case that was measured or found absent, in order."""
        return list(dict.fromkeys(x.case for x in [*self.measurements, *self.absent] if x.case is not None))

    @property
    def reasons(self) -> list[str]:
        """A line for each provider and reason, with the cases it concerns."""
        cases: dict[tuple[str, str], list[str]] = {}
        for absent in self.absent:
            cases.setdefault((absent.provider, absent.reason), []).append(absent.case.label)
        return [
            f"absent: {provider}: {reason} ({'; '.join(labels) if len(labels) <= 3 else f'{len(labels)} cases'})"
            for (provider, reason), labels in cases.items()
        ]
