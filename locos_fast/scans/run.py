"""Run a scan: every trial of a manifest that is not done yet, into a folder that survives whatever happens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.attention_registry import RecordingError
from locos_fast.models.description import describe_model
from locos_fast.models.foreign_errors import is_out_of_memory
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK
from locos_fast.prompts.prefix_tree import PrefixNode
from locos_fast.prompts.trials import Trial
from locos_fast.scans.manifest import Manifest, Shard
from locos_fast.scans.result import Scan, conclude
from locos_fast.scans.store import DONE, Arrays, ScanFolder, Status
from locos_fast.scoring.diagnosis import doubt, verdict_of
from locos_fast.scoring.directions import Norm, check_norm
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.prompt_parts import PromptParts
from locos_fast.scoring.score import score_tokens
from locos_fast.scoring.scorer import Tokenizer
from locos_fast.scoring.shared_prefixes import behind_shared_prefixes, trial_tree

FLUSH_TRIALS, FLUSH_SECONDS = 16, 5.0  # what a killed process may lose
SMALL_TOKEN_CHUNK = 512  # of the second attempt, when memory did not suffice


class Progress(NamedTuple):
    """Where a run stands. What earlier runs did counts as done, but not into run, tokens and seconds."""

    done: int  # trials
    total: int
    passed: int
    ended: int  # trials that came to an end
    run: int  # trials of this run
    tokens: int
    seconds: float


class Outcome(NamedTuple):
    """How one trial ended: its status, what its line says, and its scores if it counts."""

    status: Status
    line: dict[str, Any]
    arrays: Arrays


def scan(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    trials: Sequence[Trial],
    out: str | Path,
    *,
    norm: Norm = "none",
    gate: bool = True,
    config: dict[str, Any] | None = None,
    shard: Shard | None = None,
    resume: bool = False,
    share_prefixes: bool = True,
    token_chunk: int | None = TOKENS_PER_CHUNK,
    progress: Callable[[Progress], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Score every head on many trials, teacher-forced, into the folder `out`; returns the means over those that count.

    gate: a trial counts only if the model's own largest logit is the answer's token at every answer step.
    config: what else the trials depend on (data set, seed ...), kept in the folder. shard: the part to run.
    resume: continue a scan that the folder holds; trials that failed or lacked memory are tried again.
    progress is called after every trial, notice with a sentence about what was repaired.

    What several prompts begin with is computed once, or, where share_prefixes is False because its cache takes too much
    memory, each trial on its own: the same up to rounding. Else the scores of a trial do not depend on which others are
    run, or on how often a scan was interrupted, to the bit.
    Raises ValueError if there is no trial, if none passes the gate, or if the folder's scan is another one,
    FileExistsError if it holds one and `resume` is False or another process works on it, UnsupportedModelError for
    models that cannot be scored. On KeyboardInterrupt what is done is written before it is raised again.
    """
    folder = ScanFolder(Path(out))
    what = {"protocol": "teacher", "gate": gate, "norm": check_norm(norm), **describe_model(model), **(config or {})}
    manifest = Manifest.of(what, trials)
    with folder.locked():
        if repaired := folder.begin(manifest.as_dict(), resume=resume):
            notice(repaired)
        tree = trial_tree(trials, "all")
        mine = (shard or Shard(0, 1)).slice_of(list(tree.sequences()))
        writer = Writer(folder, manifest, mine, progress)
        skip = writer.not_to_run()
        walk = _walk(model, trials, tree, token_chunk, skip) if share_prefixes else _each_alone(tree, skip)
        try:
            for number, prefix in walk:
                outcome = _attempt(model, trials[number], norm, gate, prefix, token_chunk)
                predicted = outcome.line.get("predicted_ids", [])
                text = {"predicted": [tokenizer.decode([token]) for token in predicted]}
                writer.add(number, outcome._replace(line={**outcome.line, **text}))
        finally:
            writer.flush()
        return conclude(folder)


class Writer:
    """Collects outcomes and writes them every few trials or seconds."""

    def __init__(
        self, folder: ScanFolder, manifest: Manifest, mine: list[int], progress: Callable[[Progress], None]
    ) -> None:
        self.folder, self.manifest, self.mine, self.progress = folder, manifest, mine, progress
        self.status: dict[str, Status] = {key: line["status"] for key, line in folder.lines().items()}
        self.lines: list[dict[str, Any]] = []
        self.arrays: dict[str, Arrays] = {}
        self.run, self.tokens, self.started = 0, 0, time.monotonic()
        self.flushed = self.started

    def not_to_run(self) -> set[int]:
        """Numbers of the trials of other shards, and of those that are done."""
        mine = {i for i in self.mine if self.status.get(self.manifest.keys[i]) not in DONE}
        return set(range(len(self.manifest.keys))) - mine

    def add(self, number: int, outcome: Outcome) -> None:
        key, trial = self.manifest.keys[number], self.manifest.trials[number]
        self.lines.append({"key": key, "id": trial.id, "status": outcome.status, **outcome.line})
        if outcome.arrays:
            self.arrays[key] = outcome.arrays
        self.status[key] = outcome.status
        self.run += 1
        self.tokens += trial.length
        if len(self.lines) >= FLUSH_TRIALS or time.monotonic() - self.flushed >= FLUSH_SECONDS:
            self.flush()
        self.progress(self._progress())

    def flush(self) -> None:
        lines, arrays = self.lines, self.arrays
        self.lines, self.arrays = [], {}  # first: an interrupt in the middle must not write them twice
        if lines:
            self.folder.append(lines, arrays)
        self.flushed = time.monotonic()

    def _progress(self) -> Progress:
        states = [self.status.get(self.manifest.keys[i]) for i in self.mine]
        return Progress(
            done=sum(state in DONE for state in states),
            total=len(self.mine),
            passed=states.count("scored"),
            ended=len(states) - states.count(None),
            run=self.run,
            tokens=self.tokens,
            seconds=time.monotonic() - self.started,
        )


def _walk(
    model: PreTrainedModel, trials: Sequence[Trial], tree: PrefixNode, token_chunk: int | None, skip: set[int]
) -> Iterator[tuple[int, PrefixCache | None]]:
    """Trials behind their shared beginnings; each on its own from where memory does not suffice for those."""
    handed = set(skip)
    try:
        for number, prefix in behind_shared_prefixes(model, trials, tree, token_chunk=token_chunk, skip=skip):
            handed.add(number)
            yield number, prefix
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    _free_memory()  # out here, where the error no longer holds the cache
    yield from _each_alone(tree, handed)


def _each_alone(tree: PrefixNode, skip: set[int]) -> Iterator[tuple[int, None]]:
    return ((number, None) for number in tree.sequences() if number not in skip)


def _attempt(
    model: PreTrainedModel, trial: Trial, norm: Norm, gate: bool, prefix: PrefixCache | None, token_chunk: int | None
) -> Outcome:
    """One trial: as it is, and where memory does not suffice once more in a smaller way."""
    found = _score(model, trial, norm, prefix, token_chunk)
    if isinstance(found, Exception) and is_out_of_memory(found):
        del found
        _free_memory()
        found = _score(model, trial, norm, None, SMALL_TOKEN_CHUNK)
    return _outcome(found, gate)


def _score(
    model: PreTrainedModel, trial: Trial, norm: Norm, prefix: PrefixCache | None, token_chunk: int | None
) -> HeadScores | Exception:
    """The scores, or why there are none for this trial."""
    ids = trial.input_ids.to(model.get_input_embeddings().weight.device)
    try:
        scores = score_tokens(
            model,
            ids,
            trial.needle_span,
            trial.answer_positions,
            norm=norm,
            prefix=prefix,
            token_chunk=token_chunk,
            parts=PromptParts.of(trial),
        )
        if norm == "frozen" and verdict_of(scores.meta["completeness"], model.dtype) == "wrong":
            raise ValueError(f"completeness: {doubt(scores.meta['completeness'], model.dtype)}")
        return _without_doubtful(scores, model.dtype)
    except (UnsupportedModelError, RecordingError):
        raise
    except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError) as error:
        return error.with_traceback(None)  # whose frames would hold what did not fit


def _without_doubtful(scores: HeadScores, dtype: torch.dtype) -> HeadScores:
    """Without the scores in logits that come along if they do not add up to the model's logit."""
    completeness = scores.meta.get("frozen_completeness")
    if completeness is None or verdict_of(completeness, dtype) != "wrong":
        return scores
    kept = {name: array for name, array in scores.others.items() if "frozen" not in name}
    doubtful = {"frozen_unavailable": doubt(completeness, dtype)}
    return dataclasses.replace(scores, others=kept, meta=scores.meta | doubtful)


def _outcome(scores: HeadScores | Exception, gate: bool) -> Outcome:
    if isinstance(scores, Exception):
        return _failure("out-of-memory" if is_out_of_memory(scores) else "failed", scores)
    predicted, answer = scores.meta["predicted_ids"], scores.meta["answer_ids"]
    line = {"predicted_ids": predicted, "answer_ids": answer, "prefix_tokens": scores.meta["prefix_tokens"]}
    if reason := scores.meta.get("frozen_unavailable"):
        line["frozen_unavailable"] = reason
    if gate and predicted != answer:
        return Outcome("gated", line, {})
    return Outcome("scored", line, {name: scores.array(name).astype(np.float32) for name in scores.names})


def _failure(status: Status, error: Exception) -> Outcome:
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    return Outcome(status, {"reason": reason}, {})


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
