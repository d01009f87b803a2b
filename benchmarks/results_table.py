"""The table of the kernels suite: every provider of every case beside the per-step pipeline."""

from __future__ import annotations

from benchmarks.geometries import Case
from benchmarks.measurements import BANDWIDTH, KERNELS, MEMORY, RATIO, TIME, WALL, Results
from benchmarks.providers import BASELINES, PROVIDERS, Provider, Task
from benchmarks.suite import Cells
from benchmarks.units import megabytes, milliseconds, times

COPY, READ = "memory.copy", "memory.read"  # the machine's own bandwidth, measured in the same run


def speedup(results: Results, provider: Provider, case: Case, metric: str = TIME) -> float | None:
    """How many times less time (or memory) than the pipeline of the same task; time by turns where they were taken."""
    by_turns = results.median(provider.name, case, RATIO) if metric == TIME else None
    return by_turns if by_turns is not None else results.ratio(BASELINES[provider.task], provider.name, case, metric)


def read_bandwidth(results: Results) -> float | None:
    """The ceiling of a kernel that only reads, in bytes per second: the better of copying and reading."""
    rates = [results.median(name, None, BANDWIDTH) for name in (COPY, READ)]
    return max((rate for rate in rates if rate is not None), default=None)


def share_of_read(results: Results, provider: Provider, case: Case, metric: str = TIME) -> float | None:
    """What the path must read once, over its time (or that of its kernels alone), over the read bandwidth."""
    seconds, ceiling = results.median(provider.name, case, metric), read_bandwidth(results)
    return None if seconds is None or ceiling is None else provider.bytes_read(case) / seconds / ceiling


COLUMNS = ["provider", "geometry", "N", "T", "dtype", "median", "faster", "extra memory", "less", "GB/s", "of read"]
LEFT_ALIGNED = ("provider", "geometry", "dtype")


def cells(results: Results, device: str) -> Cells:
    """The rows of every case; on a GPU with the time that includes launching."""
    wall = device == "cuda"
    rows = (_row, _kernel_row)
    groups = [[row(results, p, case, wall) for p in PROVIDERS for row in rows] for case in results.cases]
    return Cells(
        "LOCOS terms of one attention layer, compared with the per-step pipeline",
        [*COLUMNS, "wall"] if wall else COLUMNS,
        LEFT_ALIGNED,
        [[row for row in group if row] for group in groups],
    )


def _row(results: Results, provider: Provider, case: Case, wall: bool) -> list[str] | None:
    where = _where(provider.name + (" *" if provider.remark else ""), case)
    seconds, share = results.median(provider.name, case, TIME), share_of_read(results, provider, case)
    if seconds is None:
        return [*where, "absent"] if results.reason_absent(provider.name, case) else None
    row = [
        *where,
        milliseconds(seconds),
        times(speedup(results, provider, case)),
        megabytes(results.median(provider.name, case, MEMORY)),
        times(speedup(results, provider, case, MEMORY)),
        f"{provider.bytes_read(case) / seconds / 1e9:.1f}",
        "" if share is None else f"{share:.0%}",
    ]
    return [*row, milliseconds(results.median(provider.name, case, WALL))] if wall else row


def _kernel_row(results: Results, provider: Provider, case: Case, wall: bool) -> list[str] | None:
    """The provider's Triton kernels alone; None where they were not timed."""
    seconds, share = results.median(provider.name, case, KERNELS), share_of_read(results, provider, case, KERNELS)
    if seconds is None:
        return None
    rate = f"{provider.bytes_read(case) / seconds / 1e9:.1f}"
    of_read = "" if share is None else f"{share:.0%}"
    row = [*_where(f"{provider.name}, kernels", case), milliseconds(seconds), "", "", "", rate, of_read]
    return [*row, ""] if wall else row


def _where(name: str, case: Case) -> list[str]:
    return [name, case.geometry.name, str(case.n_keys), str(case.rows), case.dtype_name]


def remarks(results: Results, device: str) -> list[str]:
    """The machine's memory, what the asterisks mean, and why providers are absent."""
    starred = dict.fromkeys(f"* {provider.name}: {provider.remark}" for provider in PROVIDERS if provider.remark)
    return [
        *memory_of_machine(results),
        *starred,
        *results.reasons,
        *with_model_attention(results),
        "GB/s: what the path must read once, over the median time",
    ]


def memory_of_machine(results: Results) -> list[str]:
    rates = {name.split(".")[1]: results.median(name, None, BANDWIDTH) for name in (COPY, READ)}
    measured = [f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items() if rate is not None]
    return [f"memory of this machine in this run: {', '.join(measured)}"] if measured else []


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
