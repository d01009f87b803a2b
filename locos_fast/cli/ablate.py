"""The command `locos-fast ablate`: is it these heads? Recall without them, beside the sets that have to be beaten."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locos_fast.cli.input import check_vocabulary, load_model
from locos_fast.cli.options import (
    INTERRUPTED,
    Attention,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Revision,
    Seed,
    Trust,
    draw,
    errors,
    folder,
    say,
    show,
    warn,
)
from locos_fast.cli.trials import (
    Characters,
    ChatTemplate,
    Dataset,
    Depths,
    Haystack,
    Lengths,
    Limit,
    NeedlesPerContext,
    PromptSuffix,
    QuestionType,
    trials_of,
)

if TYPE_CHECKING:
    from locos_fast.causal.head_sets import Ranking
    from locos_fast.causal.model_shape import ModelShape
    from locos_fast.scans.sweep import Progress

OTHER_SEED = 1_000_003  # apart: of the facts that prompts for calibration are made of
PICTURE = "ablation.png"
DETECTORS = ("score", "locos_frozen", "locos_foil", "wu", "attention_spatial", "dla", "qrhead")


def ablate(
    model: Model,
    heads: Annotated[str, typer.Option(help="A scan's folder, a JSON file of heads, or a list such as 18-6,23-2.")],
    dataset: Dataset,
    lengths: Lengths,
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the results.")],
    detectors: Annotated[
        str | None, typer.Option(help=f"Arrays of a scan to rank by, the first is judged: {','.join(DETECTORS)}.")
    ] = None,
    k: Annotated[str, typer.Option("--k", help="How many of the best heads: 1,3,5,10.")] = "1,3,5,10",
    draws: Annotated[int, typer.Option(min=1, help="Draws of each control, for each k.")] = 10,
    mode: Annotated[
        str,
        typer.Option(
            help="output-zero, output-mean, output-resample, query-zero, query-mean (as published) or needle-knockout."
        ),
    ] = "output-zero",
    calibration: Annotated[int, typer.Option(min=1, help="Other prompts from which modes take means.")] = 8,
    haystack: Haystack = None,
    depths: Depths = None,
    limit: Limit = 24,
    needles_per_context: NeedlesPerContext = 1,
    chat_template: ChatTemplate = None,
    prompt_suffix: PromptSuffix = "",
    question_type: QuestionType = None,
    characters: Characters = None,
    seed: Seed = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep that the folder holds.")] = False,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Take the best heads away and see what the model still answers, beside as many random and layer-matched heads."""
    from locos_fast.causal.ablation import MODES
    from locos_fast.causal.calibration import CALIBRATED
    from locos_fast.causal.model_shape import model_shape
    from locos_fast.models.loading import ModelSource
    from locos_fast.models.weightless import weightless
    from locos_fast.report import ablation_curves
    from locos_fast.scans.sweep import check_free, plan, sweep
    from locos_fast.scoring.result_folder import check_writable

    check_free(out, resume=resume)
    check_writable(out)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    given: dict[str, Any] = {
        "lengths": lengths,
        "depths": depths,
        "needles_per_context": needles_per_context,
        "haystack": haystack,
        "chat_template": chat_template,
        "prompt_suffix": prompt_suffix,
        "question_type": question_type,
        "characters": characters,
    }
    composed_for = trials_of(dataset, limit=limit, seed=seed, **given)
    others_for = trials_of(dataset, limit=max(calibration, needles_per_context), seed=seed + OTHER_SEED, **given)
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation, trust_remote_code)
    shape = model_shape(weightless(source.config()))
    rankings = _rankings(heads, detectors, shape)
    points = plan(rankings, shape, _counts(k), count=draws, seed=seed)
    tokenizer = source.tokenizer()
    trials = composed_for(tokenizer)
    _warn_of_same_trials(heads, trials.config)
    network, _ = load_model(source, max(len(t.prompt_ids) + len(t.answer_ids) for t in trials.trials), "lengths")
    check_vocabulary(network, chain.from_iterable((*t.prompt_ids, *t.answer_ids) for t in trials.trials))
    try:
        found = sweep(
            network,
            trials,
            points,
            out,
            mode=mode,
            calibration=others_for(tokenizer).trials[:calibration] if mode in CALIBRATED else (),
            config={"heads": heads, "revision": revision},
            resume=resume,
            progress=_report,
        )
    except KeyboardInterrupt:
        errors.print(f"interrupted; what is done is in {out}, and --resume continues from there", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    draw(ablation_curves.save_curves, found, out / PICTURE, title=f"{model}, {dataset}: recall without heads ({mode})")
    if as_json:
        print(json.dumps(found.as_dict() | {"out": str(out)}, indent=2, allow_nan=False))
        return
    show(ablation_curves.recall_table(found), ablation_curves.null_table(found))
    say(f"results and picture in {out}")


def _rankings(given: str, detectors: str | None, shape: ModelShape) -> dict[str, Ranking]:
    """Of a scan's folder by each detector that puts a head first; else what the list or file says."""
    from locos_fast.causal.head_sets import Ranking, given_heads
    from locos_fast.scans.sweep import GIVEN
    from locos_fast.scoring.head_scores import HeadScores

    if not Path(given).is_dir():
        if detectors is not None:
            raise ValueError("detectors: only a scan's folder has arrays to choose from")
        listed = given_heads(given, shape)
        return {GIVEN: Ranking({head: float(-place) for place, head in enumerate(listed)}, given)}
    scores = HeadScores.from_pretrained(given)
    if scores.score.shape != shape.score_shape:
        layers, heads = scores.score.shape
        raise ValueError(f"heads: {given} holds scores of {layers} layers of {heads} heads, the model has {shape}")
    names = [name for name in DETECTORS if name in scores.names] if detectors is None else detectors.split(",")
    found = {}
    for name in (name.strip() for name in names):
        ranking = Ranking.of(scores, name)
        if next(iter(ranking.values.values())) > 0:
            found[name] = ranking
        else:
            warn(f"{name} puts no head first: none of its values is positive")
    if not found:
        raise ValueError(f"heads: no array of {given} has a positive value")
    return found


def _counts(given: str) -> list[int]:
    parts = given.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"k: expected numbers of heads with commas between, got {given!r}")
    return [int(part) for part in parts]


def _warn_of_same_trials(heads: str, config: dict[str, Any]) -> None:
    """Heads are to be judged on other trials than those that chose them."""
    from locos_fast.scoring.head_scores import HeadScores

    if Path(heads).is_dir():
        chosen_on = HeadScores.from_pretrained(heads).meta
        if all(chosen_on.get(name) == config.get(name) for name in ("dataset", "dataset_sha256", "seed")):
            warn("the heads were chosen on a scan of the same facts; another --seed draws others")


def _report(progress: Progress) -> None:
    if errors.is_terminal:
        end = "\n" if progress.done == progress.total else ""
        errors.file.write(f"\r\x1b[K{progress.done} of {progress.total} sets of heads{end}")
        errors.file.flush()
