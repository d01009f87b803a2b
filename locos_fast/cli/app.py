"""The command line, `locos-fast`: parse, call the library, print. Bad input is one clear line and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors import SafetensorError

from locos_fast import __version__
from locos_fast.cli.attribute import attribute
from locos_fast.cli.input import load_model, read_text
from locos_fast.cli.options import (
    Attention,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Out,
    Overwrite,
    Revision,
    Seed,
    console,
    errors,
)
from locos_fast.scoring.head_scores import ARRAYS
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
    from locos_fast.scoring.head_scores import check_output

    folders = {kind: out / kind for kind in demonstration.KINDS}
    for folder in folders.values():
        check_output(folder, overwrite=overwrite)
    result = demonstration.run(length, seed=seed, progress=_progress)
    console.print(report.detector_table(result), report.recall_table(result))
    for kind, folder in folders.items():
        result.scores[kind].save_pretrained(folder, overwrite=overwrite)
    pictures.save_demo_picture(result, out / "heads.png")
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
    from locos_fast.planted.model import build

    if not overwrite and (directory / "config.json").exists():
        raise FileExistsError(f"{directory} already holds a model; choose another folder or --overwrite")
    model = build(seed=seed)
    model.save_pretrained(directory)
    console.print(f"planted model in {directory}")


@app.command()
def score(
    model: Model,
    context: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    needle: Annotated[str, typer.Option(help="The sentence that holds the evidence.")],
    question: Annotated[str, typer.Option(help="Asked after the context.")],
    answer: Annotated[str, typer.Option(help="What the heads should write; scored teacher-forced.")],
    depth: Annotated[
        float | None, typer.Option(help="Insert the needle at this percent of the context, 0 to 100.")
    ] = None,
    norm: Annotated[str, typer.Option(help="none, the published score, or frozen, true logit units.")] = "none",
    top: Annotated[int, typer.Option(min=1, help="Heads to print.")] = 10,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    verify: Annotated[bool, typer.Option(help="Check the recording against the head outputs.")] = False,
    timing: Annotated[bool, typer.Option(help="Also print seconds and peak memory.")] = False,
    force: Annotated[bool, typer.Option(help="Keep scores whose parts do not add up to the model's logit.")] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score every head of a model on one prompt of your own."""
    from locos_fast.models.loading import ModelSource
    from locos_fast.prompts.compose import compose
    from locos_fast.report import tables as report
    from locos_fast.scoring.diagnosis import diagnose
    from locos_fast.scoring.directions import check_norm
    from locos_fast.scoring.head_scores import check_output
    from locos_fast.scoring.score import score_tokens

    unit = check_norm(norm)
    if out is not None:
        check_output(out, overwrite=overwrite)
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation)
    text = read_text(context, "context")
    source.torch_dtype(source.config())  # a wrong model or dtype is said before a wrong prompt
    tokenizer = source.tokenizer()
    trial = compose(tokenizer, context=text, needle=needle, question=question, answer=answer, depth=depth)
    network, needed = load_model(source, trial.length + len(trial.answer_ids), "context")
    ids = trial.input_ids.to(network.get_input_embeddings().weight.device)
    completeness = diagnose(network).completeness if norm == "none" else None  # frozen scores bring their own
    scores = score_tokens(network, ids, trial.needle_span, trial.answer_positions, norm=unit, verify=verify)
    scores.meta |= {
        "protocol": "teacher-forced answer after context, blank line, question",
        "span": "needle tokens against all other keys the answer row sees",
        "completeness": completeness or scores.meta["completeness"],
        "revision": revision,
        "answer_tokens": [tokenizer.decode([token]) for token in trial.answer_ids],
        "question": question,
        "needle": needle,
        "answer": answer,
        "depth": trial.depth,
        "memory_estimate_bytes": needed,
    }
    _judge(scores.meta, network.dtype, force)
    if out is not None:
        scores.save_pretrained(out, overwrite=overwrite)
        _save_picture(scores, out / "heads.png")
    _print_scores(scores, top, as_json)
    if timing and not as_json:  # JSON has it in any case
        console.print(report.cost_line(scores.meta["cost"]), markup=False, highlight=False, soft_wrap=True)


app.command()(attribute)


@app.command()
def doctor(
    model: Model,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    as_json: Json = False,
) -> None:
    """Say what can be scored on a model, layer by layer, and how exactly: one short forward pass, no tokenizer."""
    from locos_fast.models.loading import ModelSource
    from locos_fast.report import tables as report
    from locos_fast.scoring import diagnosis

    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation)
    network, _ = load_model(source, diagnosis.PROMPT_TOKENS, "model")
    result = diagnosis.diagnose(network)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, allow_nan=False))
        return
    console.print(report.diagnosis_table(result))
    for line in report.diagnosis_summary(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _judge(meta: dict[str, Any], dtype: Any, force: bool) -> None:
    """Warn if the parts do not add up to the model's logit; raise ValueError if scores are far from the logits they
    claim to be."""
    from locos_fast.scoring.diagnosis import doubt, verdict_of

    sentence = doubt(meta["completeness"], dtype)
    if sentence is None:
        return
    if meta["norm"] == "none":
        _warn(f'true logit units (norm="frozen") cannot be had exactly from this model: {sentence}')
    elif verdict_of(meta["completeness"], dtype) == "wrong" and not force:
        raise ValueError(
            f"completeness: {sentence}; the scores are not logits. --force keeps them, --norm none does not need it"
        )
    else:
        _warn(sentence)


def _warn(sentence: str) -> None:
    errors.print(f"warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_scores(scores: Any, top: int, as_json: bool) -> None:
    from locos_fast.report import tables as report

    if as_json:
        heads = [
            {"head": f"{layer}-{head}"} | {name: float(getattr(scores, name)[layer, head]) for name in ARRAYS}
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


def _answer_tokens(scores: Any) -> Iterable[tuple[str, int]]:
    return zip(scores.meta["answer_tokens"], scores.meta["answer_ids"], strict=True)


def _save_picture(scores: Any, path: Path) -> None:
    from locos_fast.report.pictures import save_heat_map

    save_heat_map(scores, path, title=f"LOCOS score, {scores.meta['model']}")


def _progress(items: Iterable, what: str) -> Iterable:
    return track(list(items), description=what, console=errors, transient=True)


def _one_line(error: BaseException) -> str:
    from locos_fast.models.loading import first_line

    return first_line(error)
