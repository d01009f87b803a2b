"""What every suite has: something to measure, and how to show it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.goals import Goal
from benchmarks.measurements import Case, Results


class Refused(Exception):
    """Why nothing is timed."""


class Cells(NamedTuple):
    """A table as text, for the terminal and for NOTES.md."""

    title: str
    titles: list[str]
    left_aligned: tuple[str, ...]
    groups: list[list[list[str]]]  # one group of rows per case


class Line(NamedTuple):
    """One line of a plot: (x, p20, p50, p80) points."""

    label: str
    points: list[tuple[float, float, float, float]]


class Panel(NamedTuple):
    """One set of axes, both logarithmic; shares (in "%") are drawn on a linear one."""

    title: str
    x_label: str
    y_label: str
    unit: str  # of y: "s", "B" or "%"
    lines: list[Line]


class Suite(NamedTuple):
    """One of the things `python -m benchmarks` can run. Functions after `case_of` take results and "cpu" or "cuda"."""

    name: str
    measure: Callable[[Namespace], Iterator[Results]]  # part by part; raises Refused
    case_of: Callable[[dict], Case]
    cells: Callable[[Results, str], Cells]
    goals: Callable[[Results, str], list[Goal]]
    remarks: Callable[[Results, str], list[str]]
    panels: Callable[[Results, str], list[Panel]]


def line(results: Results, provider: str, label: str, metric: str, points: list[tuple[float, Case]]) -> Line:
    """What a provider measured at each x; cases without a measurement are left out."""
    found = [(x, results.find(provider, case, metric)) for x, case in sorted(points, key=lambda point: point[0])]
    return Line(label, [(x, m.p20, m.p50, m.p80) for x, m in found if m is not None])
