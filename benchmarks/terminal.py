"""Where everything is printed, and a table there."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from benchmarks.suite import Cells

console = Console(width=None if sys.stdout.isatty() else 180)


def table(cells: Cells) -> Table:
    """For the terminal, a rule after every group."""
    printed = Table(title=cells.title)
    for title in cells.titles:
        left = title in cells.left_aligned
        printed.add_column(title, justify="left" if left else "right", no_wrap=title == "provider")
    for group in cells.groups:
        for row in group:
            printed.add_row(*row)
        printed.add_section()
    return printed
