"""The command `locos-fast planted`: write the model whose retrieval heads are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locos_fast.cli.options import Seed, folder, say


def planted(
    directory: Annotated[Path, typer.Argument(parser=folder, metavar="FOLDER", help="Folder to write.")],
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that the folder already holds.")] = False,
) -> None:
    """Write the planted model: an ordinary Llama folder, and which of its heads do what."""
    from locos_fast.planted.model import HEADS_FILE, build
    from locos_fast.scoring.result_folder import check_writable

    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a folder")
    if (directory / HEADS_FILE).is_file():
        if not overwrite:
            raise FileExistsError(f"{directory} already holds a model; choose another folder or --overwrite")
    elif directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} holds files that are no planted model's; choose another folder")
    check_writable(directory)
    model = build(seed=seed)
    model.save_pretrained(directory)
    say(f"planted model in {directory}")
