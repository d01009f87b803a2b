"""The command `locos-fast merge`: the parts of one scan, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locos_fast.cli.options import Json, errors, folder
from locos_fast.cli.scan import show_scan
from locos_fast.report.display import shown


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders that hold parts of one scan.")],
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the whole.")],
    as_json: Json = False,
) -> None:
    """Put the shards of one scan together."""
    from locos_fast.scans.merge import merge as merge_parts
    from locos_fast.scans.store import DONE, ScanFolder
    from locos_fast.scoring.result_folder import check_writable

    check_writable(out)
    for part in parts:
        if unreadable := ScanFolder(part).what_is_unreadable():
            _note(f"{part}: {unreadable}")
    result = merge_parts(parts, out)
    if missing := sum(count for status, count in result.statuses.items() if status not in DONE):
        total = sum(result.statuses.values())
        _note(f"{missing} of {total} trials are missing: no part has them scored or gated out")
    show_scan(result, out, as_json)


def _note(sentence: str) -> None:
    errors.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)
