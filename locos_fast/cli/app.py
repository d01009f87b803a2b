"""The command line, `locos-fast`: the commands, and errors about the input as one clear line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import torch
import transformers
import typer
from safetensors import SafetensorError

from locos_fast import __version__
from locos_fast.cli.ablate import ablate
from locos_fast.cli.attribute import attribute
from locos_fast.cli.data import data
from locos_fast.cli.demo import demo
from locos_fast.cli.doctor import doctor
from locos_fast.cli.mask_checkpoint import mask_checkpoint
from locos_fast.cli.merge import merge
from locos_fast.cli.options import console, errors, warn
from locos_fast.cli.planted import planted
from locos_fast.cli.scan import scan
from locos_fast.cli.score import score
from locos_fast.models.foreign_errors import first_line, is_out_of_memory
from locos_fast.report.display import shown
from locos_fast.scoring.recording import RecordingError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

BAD_INPUT = (ValueError, OSError, SafetensorError, RecordingError, MemoryError, torch.OutOfMemoryError)
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no other name for it


def main() -> None:
    """Entry point: turns an error about the input into one line and exit code 2."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity(logging.CRITICAL)  # what is wrong is said here, in one line
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", module="locos_fast")
            warnings.showwarning = lambda message, *_: warn(message)
            code = app(standalone_mode=len(sys.argv) < 2)  # without arguments typer prints its help
    except UsageError as error:
        code = _refuse(f"{error.format_message()} (--help says more)")  # type: ignore[attr-defined]
    except typer.Abort:
        code = 130
    except BAD_INPUT as error:
        code = _refuse(first_line(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        code = _refuse(f"memory: {first_line(error)}")
    finally:
        logging.set_verbosity(verbosity)
    sys.exit(code or 0)


def _refuse(sentence: str) -> int:
    errors.print(f"error: {shown(sentence)}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Find the attention heads with which a language model retrieves its answer, by what they write (LOCOS)."""
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


for command in (demo, planted, score, scan, merge, ablate, attribute, mask_checkpoint, doctor):
    app.command()(command)
app.add_typer(data, name="data")
