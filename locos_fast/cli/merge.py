"""The command `locos-fast merge`: the parts of one scan, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locos_fast.cli.options import Json, folder
from locos_fast.cli.scan import show_scan


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders that hold parts of one scan.")],
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the whole.")],
    as_json: Json = False,
) -> None:
    """Put the shards of one scan together."""
    from locos_fast.scans.merge import merge as merge_parts
    from locos_fast.scoring.result_folder import check_writable

    check_writable(out)
    show_scan(merge_parts(parts, out), out, as_json)
