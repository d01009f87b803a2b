"""The flags that several commands share, and the two streams that commands print to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
errors = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option(help="Replace results that the folder already holds.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
Model = Annotated[str, typer.Option(help="smollm2 (a real model, built in), a model folder, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU if there is one.")]
DeviceMap = Annotated[str | None, typer.Option(help='"auto" spreads the layers over all devices.')]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 ...; the model's default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
