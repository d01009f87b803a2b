"""The flags that several commands share, and how commands print: text of others never reaches a terminal raw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from locos_fast.report.display import shown

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended

console = Console(emoji=False)  # "A:B:N" is no emoji
errors = Console(stderr=True, emoji=False)


def say(sentence: str) -> None:
    """One line on stdout, as it is: no markup, nothing that a terminal would obey."""
    console.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)


def warn(sentence: object) -> None:
    """One line on stderr, and the command goes on."""
    errors.print(f"warning: {shown(sentence)}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def show(*tables: Table) -> None:
    """Print tables, wider than the terminal rather than with digits cut off."""
    unbounded = console.options.update(max_width=10_000)
    for table in tables:
        least = console.measure(table, options=unbounded).minimum
        table.width = least if least > console.width else None
        console.print(table, crop=False)


def draw(save: Callable[..., None], result: Any, path: Path, **options: Any) -> None:
    """Save a picture of a result; one that fails costs a warning, the numbers are printed and saved already."""
    try:
        save(result, path, **options)
    except Exception as error:
        warn(f"no picture {path}: {error}")


def folder(path: str) -> Path:
    """A folder on the command line; the empty string, an unset variable most likely, is not the current folder."""
    if not path:
        raise typer.BadParameter("expected a folder, got nothing")
    return Path(path)


Out = Annotated[Path | None, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option(help="Replace results that the folder already holds.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
Model = Annotated[str, typer.Option(help="smollm2 (a real model, built in), a model folder, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU if there is one.")]
DeviceMap = Annotated[str | None, typer.Option(help='"auto" spreads the layers over all devices.')]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 ...; the model's default.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
