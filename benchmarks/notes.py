"""Puts the table of a run into NOTES.md, between the marks of its device."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine
from benchmarks.results_table import LEFT_ALIGNED, Results, header, remarks, rows

NOTES = Path(__file__).resolve().parent / "NOTES.md"


def write(results: Results, read_bandwidth: float, conclusions: list[str], device: str, file: Path = NOTES) -> None:
    """Replace what stands between `<!-- cpu -->` and `<!-- /cpu -->` (or cuda); raises ValueError without the marks."""
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- {device} -->\n", f"<!-- /{device} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{file.name}: expected the marks {begin.strip()} and {end}")
    section = _section(results, read_bandwidth, conclusions, device)
    file.write_text(before + begin + section + end + after, encoding="utf-8")


def _section(results: Results, read_bandwidth: float, conclusions: list[str], device: str) -> str:
    wall = device == "cuda"
    titles = header(wall=wall)
    lines = [
        f"{machine.device_name(device)}; {machine.versions(device)}; commit {machine.commit()}; "
        f"{datetime.now(UTC).date()}.",
        "",
        _line(titles),
        _line(["---" if title in LEFT_ALIGNED else "---:" for title in titles]),
        *(
            _line(cells + [""] * (len(titles) - len(cells)))
            for group in rows(results, read_bandwidth, wall=wall)
            for cells in group
        ),
        "",
        *(f"- {line.replace('*', chr(92) + '*')}" for line in [*conclusions, *remarks(results)]),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in cells)} |"
