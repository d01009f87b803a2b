"""The command `locos-fast planted`: write the model whose retrieval heads are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locos_fast.cli.options import Seed, console


def planted(
    directory: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that the folder already holds.")] = False,
) -> None:
    """Write the planted model: an ordinary Llama folder, and which of its heads do what."""
    from locos_fast.planted.model import build

    if not overwrite and (directory / "config.json").exists():
        raise FileExistsError(f"{directory} already holds a model; choose another folder or --overwrite")
    model = build(seed=seed)
    model.save_pretrained(directory)
    console.print(f"planted model in {directory}")
