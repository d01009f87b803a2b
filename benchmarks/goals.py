"""What a run must reach: lines of pass or fail, with the figure."""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    text: str
    passed: bool | None  # None: a figure that nobody judges here

    def __str__(self) -> str:
        return f"{'----' if self.passed is None else 'PASS' if self.passed else 'FAIL'}  {self.text}"
