"""The command line, `locos-fast`: parse, call the library, print. Bad input is one clear line and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError

from locos_fast import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option(help="Replace scores that the folder already holds.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def main() -> None:
    """Entry point: turns an error about the input into one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, SafetensorError, MemoryError) as error:
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
    from locos_fast import demo as demonstration
    from locos_fast import report
    from locos_fast.head_scores import check_output

    folders = {kind: out / kind for kind in demonstration.KINDS}
    for folder in folders.values():
        check_output(folder, overwrite=overwrite)
    result = demonstration.run(length, seed=seed, progress=_progress)
    console.print(report.detector_table(result), report.recall_table(result))
    for kind, folder in folders.items():
        result.scores[kind].save_pretrained(folder, overwrite=overwrite)
    report.save_demo_picture(result, out / "heads.png")
    console.print(f"scores in {', '.join(map(str, folders.values()))}; picture in {out / 'heads.png'}")
    if not all(result.right("score", kind) for kind in demonstration.KINDS):
        errors.print("LOCOS did not find exactly the planted heads", style="red")
        raise typer.Exit(1)


@app.command()
def planted(
    directory: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that the folder already holds.")] = False,
) -> None:
    """Write the planted model: an ordinary Llama folder, and which of its heads do what."""
    from locos_fast.planted import build

    if not overwrite and (directory / "config.json").exists():
        raise FileExistsError(f"{directory} already holds a model; choose another folder or --overwrite")
    model = build(seed=seed)
    model.save_pretrained(directory)
    console.print(f"planted model in {directory}")


@app.command()
def score(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    context: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    needle: Annotated[str, typer.Option(help="The sentence that holds the evidence.")],
    question: Annotated[str, typer.Option(help="Asked after the context.")],
    answer: Annotated[str, typer.Option(help="What the heads should write; scored teacher-forced.")],
    depth: Annotated[
        float | None, typer.Option(help="Insert the needle at this percent of the context, 0 to 100.")
    ] = None,
    top: Annotated[int, typer.Option(help="Heads to print.")] = 10,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help='"auto" spreads the layers over all devices.')] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 ...; the model's default.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Check the recording against the head outputs.")] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score every head of a model on one prompt of your own."""
    from locos_fast.head_scores import check_output
    from locos_fast.loading import ModelSource
    from locos_fast.memory_estimate import estimate, refuse_if_too_large
    from locos_fast.prompts import compose
    from locos_fast.scoring import score_tokens

    if out is not None:
        check_output(out, overwrite=overwrite)
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation)
    text = read_context(context)
    config = source.config()
    target_dtype = source.torch_dtype(config)
    trial = compose(source.tokenizer(), context=text, needle=needle, question=question, answer=answer, depth=depth)
    needed = estimate(config, trial.length + len(trial.answer_ids), target_dtype, attn_implementation)
    if device_map is None:
        refuse_if_too_large(needed, source.torch_device())
    network: Any = source.load()
    ids = trial.input_ids.to(network.get_input_embeddings().weight.device)
    scores = score_tokens(network, ids, trial.needle_span, trial.answer_positions, verify=verify)
    scores.meta |= {
        "revision": revision,
        "answer_tokens": [source.tokenizer().decode([token]) for token in trial.answer_ids],
        "question": question,
        "needle": needle,
        "answer": answer,
        "depth": trial.depth,
        "memory_estimate_bytes": needed.total,
    }
    if out is not None:
        scores.save_pretrained(out, overwrite=overwrite)
        _save_picture(scores, out / "heads.png")
    _print_scores(scores, top, as_json)


def read_context(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError in one line if it is not one."""
    if not path.is_file():
        raise ValueError(f"context: no file {str(path)!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"context: {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _print_scores(scores: Any, top: int, as_json: bool) -> None:
    from locos_fast import report

    if as_json:
        heads = [
            {"head": f"{layer}-{head}"} | {name: float(getattr(scores, name)[layer, head]) for name in _SHOWN}
            for layer, head in scores.top(top)
        ]
        print(json.dumps({"heads": heads, "meta": scores.meta}, indent=2))
        return
    console.print(report.scores_table(scores, top))
    tokens = ", ".join(f"{token!r} ({i})" for token, i in _answer_tokens(scores))
    console.print(f"scored answer tokens: {tokens}", markup=False)
    for start, end in scores.meta["needle_spans"]:
        console.print(f"needle: tokens {start} to {end - 1} of {scores.meta['tokens']}", highlight=False)
    if scores.meta["predicted_ids"] != scores.meta["answer_ids"]:
        console.print("note: the model itself would not have answered this; heads are scored toward it all the same")


_SHOWN = ("score", "l_plus", "l_minus", "dla", "attention_spatial", "wu")


def _answer_tokens(scores: Any) -> Iterable[tuple[str, int]]:
    return zip(scores.meta["answer_tokens"], scores.meta["answer_ids"], strict=True)


def _save_picture(scores: Any, path: Path) -> None:
    from locos_fast import report

    report.save_heat_map(scores, path, title=f"LOCOS score, {scores.meta['model']}")


def _progress(items: Iterable, what: str) -> Iterable:
    return track(list(items), description=what, console=errors, transient=True)


def _one_line(error: BaseException) -> str:
    from locos_fast.loading import first_line

    return first_line(error)
