"""The command `locos-fast scan`: every head of a model, scored on many trials, into a folder that can be continued."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locos_fast.cli.input import beginnings_fit, check_vocabulary, load_model
from locos_fast.cli.options import (
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
from locos_fast.report.display import shown

if TYPE_CHECKING:
    from locos_fast.prompts.needle_prompt import Fact
    from locos_fast.scans.result import Scan
    from locos_fast.scans.run import Progress

HEADS_SHOWN = 10
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended
LOG_SECONDS = 30.0  # between lines of progress where there is no terminal


def scan(
    model: Model,
    dataset: Annotated[
        str,
        typer.Option(help="numbers (the needle says the answer), bridges (it has to be inferred), or a .jsonl file."),
    ],
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens: A:B:N, N of them from A to B, or A,B,...")],
    out: Annotated[Path, typer.Option(parser=folder, metavar="FOLDER", help="Folder for the results.")],
    haystack: Annotated[str, typer.Option(help="essays, a UTF-8 text file, or a folder of .txt files.")] = "essays",
    depths: Annotated[
        str | None, typer.Option(help="How many depths from 0 to 100 %, or percentages: 10,50,90; 5 of them.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Trials at most, spread evenly over lengths and depths.")] = 96,
    needles_per_context: Annotated[
        int, typer.Option(min=1, help="Hide that many needles, evenly spaced, in one context and ask for each.")
    ] = 1,
    norm: Annotated[str, typer.Option(help="none, the published score, or frozen, true logit units.")] = "none",
    gate: Annotated[bool, typer.Option(help="Count only trials that the model itself answers right.")] = True,
    chat_template: Annotated[
        bool | None, typer.Option(help="Ask as a chat, thinking off; the default if the tokenizer has a template.")
    ] = None,
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
    from locos_fast.prompts.haystacks import read_haystack
    from locos_fast.prompts.needle_grid import Grid, needle_trials, packed_trials
    from locos_fast.prompts.needle_prompt import Composer, Haystack
    from locos_fast.scans.manifest import Shard
    from locos_fast.scans.run import scan as run_scan
    from locos_fast.scans.store import ScanFolder
    from locos_fast.scoring.directions import check_norm
    from locos_fast.scoring.result_folder import check_writable

    unit, part = check_norm(norm), None if shard is None else Shard.parse(shard)
    if packed := needles_per_context > 1:
        if depths is not None:
            raise ValueError("depths: --needles-per-context spreads the needles evenly; give one of the two")
        depths = str(needles_per_context)
    grid = Grid.parse(lengths, depths or "5")
    ScanFolder(out).check_free(resume=resume)
    check_writable(out)
    facts, text = _facts(dataset, seed), read_haystack(haystack)
    source = ModelSource(model, revision, dtype, device, device_map, attn_implementation, trust_remote_code)
    source.torch_dtype(source.config())  # a wrong model or dtype is said before a wrong prompt
    tokenizer = source.tokenizer()
    if chat_template is None:
        chat_template = bool(getattr(tokenizer, "chat_template", None))
    composer, hay = Composer(tokenizer, chat_template=chat_template), Haystack.of(tokenizer, text)
    facts, left_out = _not_given_away(facts, hay.beginning(max(grid.lengths)), dataset)
    name = Path(dataset).stem
    if packed:
        trials = packed_trials(
            composer, hay, facts, grid.lengths, per_context=needles_per_context, limit=limit, name=name
        )
    else:
        trials = needle_trials(composer, hay, facts, grid, limit=limit, name=name, seed=seed)
    with_cache = beginnings_fit(source, trials)
    network, _ = load_model(source, max(len(t.prompt_ids) + len(t.answer_ids) for t in trials), "lengths")
    if with_cache is not None and not with_cache.fits:
        _note(str(with_cache))
    check_vocabulary(network, chain.from_iterable((*t.prompt_ids, *t.answer_ids) for t in trials))
    config = {
        "dataset": name,
        "dataset_sha256": _digest(json.dumps(facts)),
        "left_out": left_out,
        "haystack": haystack,
        "haystack_sha256": _digest(text),
        "contexts": "packed" if packed else "single",
        "needles_per_context": needles_per_context,
        "lengths": grid.lengths,
        "depths": grid.depths,
        "limit": limit,
        "chat_template": chat_template,
        "seed": seed,
        "revision": revision,
    }
    try:
        result = run_scan(
            network,
            tokenizer,
            trials,
            out,
            norm=unit,
            gate=gate,
            config=config,
            shard=part,
            resume=resume,
            share_prefixes=with_cache is None or with_cache.fits,
            progress=_reporter(),
            notice=_note,
        )
    except KeyboardInterrupt:
        _note(f"interrupted; what is done is in {out}, and --resume continues from there")
        raise typer.Exit(INTERRUPTED) from None
    show_scan(result, out, as_json)


def show_scan(result: Scan, out: Path, as_json: bool) -> None:
    """Print what a scan found."""
    from locos_fast.report import scan_tables
    from locos_fast.scans.result import gate_rate

    scores, rate = result.scores, gate_rate(result.statuses)
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
    say(scan_tables.statistics_line(scores))
    say(f"scores and trials in {out}")


def _facts(dataset: str, seed: int) -> list[Fact]:
    from locos_fast.prompts.built_in_facts import BUILT_IN_FACTS
    from locos_fast.prompts.fact_files import read_facts

    if dataset in BUILT_IN_FACTS:
        return BUILT_IN_FACTS[dataset](seed)
    if not Path(dataset).is_file():
        raise ValueError(f"dataset: expected {', '.join(BUILT_IN_FACTS)} or a .jsonl file, got {dataset!r}")
    return read_facts(Path(dataset))


def _not_given_away(facts: Sequence[Fact], text: str, dataset: str) -> tuple[list[Fact], list[str]]:
    """The facts whose answers the haystack does not give away, and the ids of the others.

    Raises ValueError if one of a file's own is among them, or if none is left.
    """
    from locos_fast.prompts.built_in_facts import BUILT_IN_FACTS
    from locos_fast.prompts.needle_grid import given_away

    found = {fact.id: word for fact in facts if (word := given_away(fact, text))}
    kept = [fact for fact in facts if fact.id not in found]
    if found and (dataset not in BUILT_IN_FACTS or not kept):
        which, word = next(iter(found.items()))
        raise ValueError(f"haystack: it gives the answer of {which} away: {word!r}; choose another haystack or needle")
    if found:
        _note(f"{len(found)} of {len(facts)} facts are left out: their answers stand in the haystack")
    return kept, sorted(found)


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
        f"{progress.done} of {progress.total} trials, {progress.passed / max(progress.ended, 1):.0%} pass, "
        f"{progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s, about {left / speed:.0f} s left"
    )


def _note(sentence: str) -> None:
    errors.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
