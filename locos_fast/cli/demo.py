"""The command `locos-fast demo`: heads that are known by construction are found, then those of a real model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from locos_fast.cli.options import Json, Overwrite, Seed, draw, errors, folder, say, show, warn

PICTURES = ("heads.png", "real.png")


def demo(
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for scores and pictures.")] = Path(
        "demo"
    ),
    length: Annotated[int, typer.Option(help="Tokens per prompt of the planted model.")] = 512,
    planted_only: Annotated[bool, typer.Option("--planted-only", help="Leave the real model out.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the heads planted in a model whose retrieval heads are known, then those of a real model; ablate both."""
    from locos_fast.demo import known_heads
    from locos_fast.planted.model import MAX_LENGTH
    from locos_fast.report.pictures import save_demo_picture
    from locos_fast.scoring.head_scores import SCORES
    from locos_fast.scoring.result_folder import check_writable

    if length > MAX_LENGTH:
        raise ValueError(f"length: expected at most {MAX_LENGTH} tokens, the planted model's positions, got {length}")
    missing = None if planted_only else _missing()
    folders = {kind: out / kind for kind in known_heads.KINDS}
    for target in folders.values():
        SCORES.check(target, overwrite=overwrite)
        check_writable(target)
    if taken := [name for name in PICTURES if not overwrite and (out / name).exists()]:
        raise FileExistsError(f"{out} already holds {', '.join(taken)}; choose another folder or --overwrite")
    if missing is not None:
        warn(f"the real model is left out: {missing}")
    planted = known_heads.run(length, seed=seed, progress=_progress)
    if not as_json:
        _print_planted(planted)
    for kind, target in folders.items():
        planted.scores[kind].save_pretrained(target, overwrite=overwrite)
    draw(save_demo_picture, planted, out / PICTURES[0])
    real = None if planted_only or missing is not None else _real(out, seed, as_json)
    if as_json:
        print(json.dumps({"planted": planted.as_dict(), "real": real}, indent=2, allow_nan=False))
    else:
        places = [*folders.values(), out / PICTURES[0], *([] if real is None else [out / PICTURES[1]])]
        say(f"scores and pictures in {', '.join(map(str, places))}")
    if not all(planted.right("score", kind) for kind in known_heads.KINDS):
        errors.print("LOCOS did not find exactly the planted heads", style="red")
        raise typer.Exit(1)


def _missing() -> str | None:
    """What the real part lacks, in one line."""
    from locos_fast.models.built_in import BUILT_IN
    from locos_fast.prompts.haystacks import ESSAYS

    for wheel in (BUILT_IN["smollm2"].wheel, ESSAYS):
        try:
            wheel.installed_version()
        except ValueError as error:
            return str(error)
    return None


def _real(out: Path, seed: int, as_json: bool) -> dict[str, Any]:
    """Run, draw and print the real part; its numbers."""
    from transformers.utils.logging import disable_progress_bar

    from locos_fast.demo import real_heads
    from locos_fast.report import real_heads as report

    disable_progress_bar()  # this command has one of its own
    results = real_heads.run(seed=seed, progress=_progress)
    draw(report.save_picture, results, out / PICTURES[1])
    if not as_json:
        show(report.recall_table(results))
    return report.as_dict(results)


def _print_planted(result: Any) -> None:
    from locos_fast.report import tables as report

    show(report.detector_table(result), report.recall_table(result))


def _progress(items: Iterable, what: str) -> Iterable:
    return track(list(items), description=what, console=errors, transient=True)
