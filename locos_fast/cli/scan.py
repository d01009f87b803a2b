"""The command `locos-fast scan`: every head of a model, scored on many trials, into a folder that can be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locos_fast.cli.input import beginnings_fit, check_vocabulary, load_model
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
    errors,
    folder,
    say,
    show,
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
from locos_fast.report.display import shown

if TYPE_CHECKING:
    from locos_fast.scans.result import NothingCountsError, Scan
    from locos_fast.scans.run import Progress

HEADS_SHOWN = 10
REASONS_SHOWN = 3
LOG_SECONDS = 30.0  # between lines of progress where there is no terminal


def scan(
    model: Model,
    dataset: Dataset,
    lengths: Lengths,
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the results.")],
    haystack: Haystack = None,
    depths: Depths = None,
    limit: Limit = 96,
    needles_per_context: NeedlesPerContext = 1,
    norm: Annotated[str, typer.Option(help="none, the published score, or frozen, true logit units.")] = "none",
    protocol: Annotated[
        str,
        typer.Option(help="teacher: the answer is given, one pass scores it; generate: the model answers by itself."),
    ] = "teacher",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a generated reply; 50.")] = None,
    max_thinking_tokens: Annotated[
        int | None, typer.Option(min=0, help="Of a generated reply, on top of those; 0.")
    ] = None,
    gate: Annotated[bool, typer.Option(help="Count only trials that the model itself answers right.")] = True,
    tuned_lens: Annotated[
        Path | None, typer.Option(help="Also score through a tuned lens, a .pt or .safetensors file.")
    ] = None,
    cri: Annotated[
        bool, typer.Option("--cri", help="Also patch every head on its own: slow, a pass for every few heads.")
    ] = False,
    chat_template: ChatTemplate = None,
    prompt_suffix: PromptSuffix = "",
    question_type: QuestionType = None,
    characters: Characters = None,
    seed: Seed = 0,
    shard: Annotated[str | None, typer.Option(help="I/N: run the I-th of N parts; `merge` puts them together.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the scan that the folder holds.")] = False,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Score every head of a model on many trials; the results survive being interrupted."""
    from locos_fast.models.loading import ModelSource
    from locos_fast.scans.attempt import Method
    from locos_fast.scans.manifest import Shard
    from locos_fast.scans.result import NothingCountsError
    from locos_fast.scans.run import scan as run_scan
    from locos_fast.scans.store import ScanFolder
    from locos_fast.scoring.directions import check_norm
    from locos_fast.scoring.result_folder import check_writable
    from locos_fast.scoring.tuned_lens import TunedLens

    part = None if shard is None else Shard.parse(shard)
    of_reply = {"max_new_tokens": max_new_tokens, "max_thinking_tokens": max_thinking_tokens}
    given = {name: tokens for name, tokens in of_reply.items() if tokens is not None}
    if given and protocol != "generate":
        raise ValueError(f"{next(iter(given)).replace('_', '-')}: only --protocol generate has replies")
    lens = None if tuned_lens is None else TunedLens.load(tuned_lens)
    method = Method(protocol, check_norm(norm), gate, lens=lens, cri=cri, **given)  # type: ignore[arg-type]
    ScanFolder(out).check_free(resume=resume)
    check_writable(out)
    composed_for = trials_of(
        dataset,
        lengths=lengths,
        depths=depths,
        limit=limit,
        needles_per_context=needles_per_context,
        haystack=haystack,
        chat_template=chat_template,
        prompt_suffix=prompt_suffix,
        question_type=question_type,
        characters=characters,
        seed=seed,
    )
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation, trust_remote_code)
    source.torch_dtype(source.config())  # a wrong model or dtype is said before a wrong prompt
    tokenizer = source.tokenizer()
    trials, config, notes = composed_for(tokenizer)
    for note in notes:
        _note(note)
    with_cache = beginnings_fit(source, trials, method.reply_tokens)
    longest = max(len(t.prompt_ids) + max(len(t.answer_ids), method.reply_tokens) for t in trials)
    network, _ = load_model(source, longest, "lengths", reply_tokens=method.reply_tokens)
    if with_cache is not None and not with_cache.fits:
        _note(str(with_cache))
    check_vocabulary(network, chain.from_iterable((*t.prompt_ids, *t.answer_ids) for t in trials))
    try:
        result = run_scan(
            network,
            tokenizer,
            trials,
            out,
            method=method,
            config=config | {"revision": revision},
            shard=part,
            resume=resume,
            share_prefixes=with_cache is None or with_cache.fits,
            progress=_reporter(),
            notice=_note,
        )
    except KeyboardInterrupt:
        _note(f"interrupted; what is done is in {out}, and --resume continues from there")
        raise typer.Exit(INTERRUPTED) from None
    except NothingCountsError as error:
        if part is None:
            raise
        show_empty_shard(error, out, as_json)
        return
    show_scan(result, out, as_json)


def show_empty_shard(error: NothingCountsError, out: Path, as_json: bool) -> None:
    """A part of a scan in which no trial counts is a part all the same."""
    _note(f"{error}; merge puts it together with the other parts")
    if as_json:
        found = {"trials": sum(error.statuses.values()), "passed": 0, "heads": [], "statuses": error.statuses}
        print(json.dumps(found | {"out": str(out)}, indent=2))


def show_scan(result: Scan, out: Path, as_json: bool) -> None:
    """Print what a scan found."""
    from locos_fast.report import scan_tables

    scores, rate = result.scores, result.scores.meta["gate_rate"]
    heads = scan_tables.scan_heads(scores, HEADS_SHOWN)
    if as_json:
        print(
            json.dumps(
                {
                    "trials": sum(result.statuses.values()),
                    "passed": result.statuses.get("scored", 0),
                    "gate_rate": rate,
                    "heads": heads,
                    "statuses": result.statuses,
                    "gate_rate_by_cell": scores.meta["gate_rate_by_cell"],
                    "statistics": scores.meta["statistics"],
                    "out": str(out),
                },
                indent=2,
            )
        )
        return
    show(scan_tables.scan_table(scores, HEADS_SHOWN))
    show(scan_tables.detectors_table(scores), scan_tables.gate_table(result.cells))
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(result.statuses.items()))
    say(f"trials: {statuses}")
    for reason in unscored_reasons(out)[:REASONS_SHOWN]:
        say(f"not scored: {reason}; scan --resume tries such trials again")
    say(scan_tables.statistics_line(scores))
    say(f"scores and trials in {out}")


def unscored_reasons(out: Path) -> list[str]:
    """Why trials failed, or lacked memory; each reason once."""
    from locos_fast.scans.store import DONE, ScanFolder

    lines = ScanFolder(out).lines().values()
    return list(dict.fromkeys(str(line.get("reason")) for line in lines if line["status"] not in DONE))


def _reporter() -> Callable[[Progress], None]:
    """Where the scan stands: one line that changes on a terminal, a line now and then in a log."""
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        line = _progress_line(progress)
        if errors.is_terminal:
            errors.file.write(f"\r\x1b[K{line}" + ("\n" if progress.done == progress.total else ""))
            errors.file.flush()
        elif progress.done == progress.total or time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            _note(line)

    return report


def _progress_line(progress: Progress) -> str:
    left, speed = progress.total - progress.done, progress.run / max(progress.seconds, 1e-9)
    return (
        f"{progress.done} of {progress.total} trials, {progress.passed / max(progress.judged, 1):.0%} pass, "
        f"{progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s, about {left / speed:.0f} s left"
    )


def _note(sentence: str) -> None:
    errors.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)
