"""The command line, `locos-fast`: the commands, and errors about the input as one clear line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from safetensors import SafetensorError

from locos_fast import __version__
from locos_fast.cli.attribute import attribute
from locos_fast.cli.doctor import doctor
from locos_fast.cli.options import Overwrite, Seed, console, errors
from locos_fast.cli.planted import planted
from locos_fast.cli.score import score
from locos_fast.scoring.recording import RecordingError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

BAD_INPUT = (ValueError, OSError, SafetensorError, RecordingError, MemoryError, torch.OutOfMemoryError)


def main() -> None:
    """Entry point: turns an error about the input into one line and exit code 2."""
    try:
        app()
    except BAD_INPUT as error:
        errors.print(f"error: {_one_line(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Find the attention heads with which a language model retrieves its answer, by what they write (LOCOS)."""
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for scores and picture.")] = Path("demo"),
    length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 512,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Find the heads planted in a model whose retrieval heads are known, then ablate them."""
    from locos_fast.demo import known_heads as demonstration
    from locos_fast.report import pictures
    from locos_fast.report import tables as report
    from locos_fast.scoring.head_scores import SCORES
    from locos_fast.scoring.result_folder import check_writable

    folders = {kind: out / kind for kind in demonstration.KINDS}
    for folder in folders.values():
        SCORES.check(folder, overwrite=overwrite)
        check_writable(folder)
    result = demonstration.run(length, seed=seed, progress=_progress)
    console.print(report.detector_table(result), report.recall_table(result))
    for kind, folder in folders.items():
        result.scores[kind].save_pretrained(folder, overwrite=overwrite)
    pictures.save_demo_picture(result, out / "heads.png")
    console.print(f"scores in {', '.join(map(str, folders.values()))}; picture in {out / 'heads.png'}")
    if not all(result.right("score", kind) for kind in demonstration.KINDS):
        errors.print("LOCOS did not find exactly the planted heads", style="red")
        raise typer.Exit(1)


for command in (planted, score, attribute, doctor):
    app.command()(command)


def _progress(items: Iterable, what: str) -> Iterable:
    return track(list(items), description=what, console=errors, transient=True)


def _one_line(error: BaseException) -> str:
    from locos_fast.models.loading import first_line

    return first_line(error)
