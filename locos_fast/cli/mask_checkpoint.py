"""The command `locos-fast mask-checkpoint`: a model folder in which some heads write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locos_fast.cli.options import Model, Revision, Trust, folder, say


def mask_checkpoint(
    model: Model,
    heads: Annotated[
        str, typer.Option(help="A list such as 18-6,23-2, a score folder (a scan's too), or a JSON file of heads.")
    ],
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the masked checkpoint.")],
    k: Annotated[int | None, typer.Option(min=1, help="How many of the best heads of a folder or file.")] = None,
    by: Annotated[str | None, typer.Option(help="Array of a score folder that ranks: score, dla, wu ...")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a masked checkpoint that the folder already holds.")] = False,
) -> None:
    """Write a model folder in which the chosen heads write nothing, for whatever runs Hugging Face checkpoints."""
    from locos_fast.causal import masked_checkpoint
    from locos_fast.causal.head_sets import given_heads
    from locos_fast.causal.model_shape import model_shape
    from locos_fast.models.loading import ModelSource
    from locos_fast.models.weightless import weightless
    from locos_fast.scoring.head_scores import head_name

    source = ModelSource(model, revision, trust_remote_code=trust_remote_code)
    chosen = given_heads(heads, model_shape(weightless(source.config())), k=k, by=by)
    done = masked_checkpoint.mask_checkpoint(source, chosen, out, overwrite=overwrite)
    say(f"{model} without {', '.join(map(head_name, done.heads))} in {out}")
    files = len(done.rewritten) + len(done.unchanged)
    say(f"{len(done.rewritten)} of {files} weight files rewritten; {masked_checkpoint.PROVENANCE} says what was done")
