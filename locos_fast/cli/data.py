"""The command `locos-fast data get`: data sets of others, downloaded where their authors publish them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locos_fast.cli.options import folder, say
from locos_fast.models.foreign_errors import first_line
from locos_fast.prompts.datasets.published import PUBLISHED

if TYPE_CHECKING:
    from locos_fast.prompts.datasets.published import Published

data = typer.Typer(no_args_is_help=True, help="Data sets of others, for `scan`.")


@data.callback()
def _group() -> None:
    """Data sets of others, for `scan`."""


@data.command()
def get(
    name: Annotated[str, typer.Argument(help="nolima (nolima-hard is in it) or niah.")],
    out: Annotated[
        Path | None, typer.Option(parser=folder, metavar="FOLDER", help="Where to put it; the user's cache folder.")
    ] = None,
) -> None:
    """Download a data set of others, or say what to put where by hand."""
    if name not in PUBLISHED:
        raise ValueError(f"data: expected {' or '.join(PUBLISHED)}, got {name!r}")
    published = PUBLISHED[name]
    target = out or published.folder
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder")
    say(f"licence: {published.name}: {published.licence}")
    if published.hub_id is None:
        raise ValueError(f"data: {published.name} cannot be downloaded from the hub; {published.by_hand(target)}")
    _download(published, published.hub_id, target)
    say(f"{published.name} in {target}")
    given = "" if out is None else f":{target}"
    say(f"use it with `locos-fast scan --dataset {published.name}{given} ...`")


def _download(published: Published, hub_id: str, target: Path) -> None:
    """Raises ValueError, with the way to do it by hand, if the hub does not hand everything out."""
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            hub_id, repo_type="dataset", local_dir=target, allow_patterns=list(published.files)
        )
    except Exception as error:  # whatever a missing network makes the hub's client raise
        reason = first_line(error)
        raise ValueError(f"data: cannot download {hub_id}; {published.by_hand(target)} ({reason})") from error
    needed = [pattern for pattern in published.files if not pattern.startswith("LICENSE")]
    if lacking := [pattern for pattern in needed if not any(target.glob(pattern))]:  # offline it takes what is there
        raise ValueError(f"data: {hub_id} came without {lacking[0]}; {published.by_hand(target)}")
