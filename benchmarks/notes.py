"""Puts the table of a suite into NOTES.md, between the marks of its device."""

from __future__ import annotations

from pathlib import Path

from benchmarks.suite import Cells

NOTES = Path(__file__).resolve().parent / "NOTES.md"
FIRST = "kernels"  # the suite whose marks name the device only


def write(suite: str, device: str, heading: str, cells: Cells, lines: list[str], file: Path = NOTES) -> None:
    """Replace what stands between `<!-- cpu model -->` and `<!-- /cpu model -->`; `<!-- cpu -->` for the kernels.

    Raises ValueError without the marks.
    """
    text = file.read_text(encoding="utf-8")
    name = device if suite == FIRST else f"{device} {suite}"
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{file.name}: expected the marks {begin.strip()} and {end}")
    file.write_text(before + begin + _section(heading, cells, lines) + end + after, encoding="utf-8")


def _section(heading: str, cells: Cells, lines: list[str]) -> str:
    titles = cells.titles
    parts = [
        heading,
        "",
        _line(titles),
        _line(["---" if title in cells.left_aligned else "---:" for title in titles]),
        *(_line(row + [""] * (len(titles) - len(row))) for group in cells.groups for row in group),
        "",
        *(f"- {_escaped(line)}" for line in lines),
    ]
    return "\n".join(parts) + "\n"


def _line(row: list[str]) -> str:
    return f"| {' | '.join(map(_escaped, row))} |"


def _escaped(text: str) -> str:
    return text.replace("*", "\\*")
