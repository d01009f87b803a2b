"""The table a run prints: every provider of every case beside the per-step pipeline."""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table

from benchmarks.geometries import Case
from benchmarks.measurements import MEMORY, TIME, WALL, Absent, Measurement
from benchmarks.providers import BASELINES, PROVIDERS, Provider, Task


class Results(NamedTuple):
    """Everything one run measured."""

    measurements: list[Measurement]
    absent: list[Absent]

    def median(self, provider: str, case: Case, metric: str) -> float | None:
        """None where it was not measured."""
        for found in self.measurements:
            if (found.provider, found.case, found.metric) == (provider, case, metric):
                return found.p50
        return None

    def speedup(self, provider: Provider, case: Case, metric: str = TIME) -> float | None:
        """How many times less time (or memory) than the pipeline of the same task."""
        own, baseline = (self.median(name, case, metric) for name in (provider.name, BASELINES[provider.task]))
        return None if own is None or baseline is None else baseline / own

    def reason_absent(self, provider: str, case: Case) -> str | None:
        return next((a.reason for a in self.absent if (a.provider, a.case) == (provider, case)), None)

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(m.case for m in self.measurements if m.case is not None))


COLUMNS = ["provider", "geometry", "N", "T", "dtype", "median", "faster", "extra memory", "less", "GB/s", "of read"]
LEFT_ALIGNED = ("provider", "geometry", "dtype")


def header(*, wall: bool) -> list[str]:
    """Titles of the columns; `wall` adds the time that includes launching (GPU)."""
    return [*COLUMNS, "wall"] if wall else COLUMNS


def rows(results: Results, read_bandwidth: float, *, wall: bool) -> list[list[list[str]]]:
    """The cells of every row, grouped by case; `read_bandwidth` in bytes per second."""
    cells = [
        [_cells(results, provider, case, read_bandwidth, wall) for provider in PROVIDERS] for case in results.cases
    ]
    return [[row for row in group if row] for group in cells]


def results_table(results: Results, read_bandwidth: float, *, wall: bool) -> Table:
    """For the terminal."""
    table = Table(title="LOCOS terms of one attention layer, compared with the per-step pipeline")
    for title in header(wall=wall):
        table.add_column(title, justify="left" if title in LEFT_ALIGNED else "right", no_wrap=title == "provider")
    for group in rows(results, read_bandwidth, wall=wall):
        for cells in group:
            table.add_row(*cells)
        table.add_section()
    return table


def _cells(results: Results, provider: Provider, case: Case, read_bandwidth: float, wall: bool) -> list[str] | None:
    name = provider.name + (" *" if provider.remark else "")
    where = [name, case.geometry.name, str(case.n_keys), str(case.rows), case.dtype_name]
    seconds = results.median(provider.name, case, TIME)
    if seconds is None:
        return [*where, "absent"] if results.reason_absent(provider.name, case) else None
    memory = results.median(provider.name, case, MEMORY)
    rate = provider.bytes_read(case) / seconds
    cells = [
        *where,
        milliseconds(seconds),
        times(results.speedup(provider, case)),
        megabytes(memory),
        times(results.speedup(provider, case, MEMORY)),
        f"{rate / 1e9:.1f}",
        f"{rate / read_bandwidth:.0%}",
    ]
    return [*cells, milliseconds(results.median(provider.name, case, WALL))] if wall else cells


def remarks(results: Results) -> list[str]:
    """What the asterisks mean, and why providers are absent."""
    starred = dict.fromkeys(f"* {provider.name}: {provider.remark}" for provider in PROVIDERS if provider.remark)
    missing = dict.fromkeys(f"absent: {absent.provider}: {absent.reason}" for absent in results.absent)
    return [
        *starred,
        *missing,
        *with_model_attention(results),
        "GB/s: what the path must read once, over the median time",
    ]


def with_model_attention(results: Results) -> list[str]:
    """Compare again with one attention added to ours: the pipeline's eager attention also gives the head output."""
    lines = []
    for case in results.cases:
        pipeline, attention = (results.median(name, case, TIME) for name in (BASELINES[Task.QUERIES], "sdpa.total"))
        own = {p.name: results.median(p.name, case, TIME) for p in PROVIDERS if p.ours and p.task is Task.QUERIES}
        if pipeline is None or attention is None:
            continue
        ratios = [f"{name} {times(pipeline / (t + attention))}" for name, t in own.items() if t is not None]
        lines.append(f"faster with sdpa.total added, {case.label}: {', '.join(ratios)}")
    return lines


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e6:.0f} MB"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:.0f}x"
