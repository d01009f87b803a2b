"""Run a scan: every trial of a manifest that is not done yet, into a folder that survives whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from locos_fast.models.description import describe_model, model_identity
from locos_fast.models.foreign_errors import is_out_of_memory
from locos_fast.prompts.prefix_tree import PrefixNode
from locos_fast.prompts.scan_trials import ScanTrials
from locos_fast.prompts.trials import Trial
from locos_fast.scans.attempt import TEACHER, Attempts, Method, Outcome, free_memory
from locos_fast.scans.manifest import Manifest, Shard
from locos_fast.scans.result import NothingCountsError, Scan, conclude
from locos_fast.scans.store import DONE, Arrays, ScanFolder, Status
from locos_fast.scoring.scorer import Tokenizer
from locos_fast.scoring.shared_prefixes import Group, behind_shared_prefixes, cannot_share, trial_tree

FLUSH_TRIALS, FLUSH_SECONDS = 16, 5.0  # what a killed process may lose
SHOWN_REPLIES = 3  # where no trial counts


class Progress(NamedTuple):
    """Where a run stands. What earlier runs did counts as done, but not into run, tokens and seconds."""

    done: int  # trials that this run does not try, or try again
    total: int
    passed: int
    judged: int  # trials that were scored or gated out
    run: int  # trials of this run
    tokens: int
    seconds: float


def scan(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    trials: Sequence[Trial] | ScanTrials,
    out: str | Path,
    *,
    method: Method = TEACHER,
    config: dict[str, Any] | None = None,
    shard: Shard | None = None,
    resume: bool = False,
    share_prefixes: bool = True,
    progress: Callable[[Progress], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Score every head on many trials, by every detector, into the folder `out`; returns the means over those that
    count.

    trials: of any origin, or those of a data set, `scan_trials(tokenizer, "numbers", lengths=[400, 1600])`, with what
    they depend on. method: the protocol, the gate and the norm.
    config: what else the trials depend on (data set, seed ...), kept in the folder. shard: the part to run.
    resume: continue a scan that the folder holds; trials that failed or lacked memory are tried again.
    progress is called after every trial, notice with a sentence about what was repaired.

    What several prompts begin with is computed once, or, where share_prefixes is False because its cache takes too much
    memory, each trial on its own: the same up to rounding. A scan that is continued does as it did before. So the
    scores of a trial do not depend on which others are run, or on how often a scan was interrupted, to the bit, unless
    memory gives out on the way.
    Raises ValueError if there is no trial, if none passes the gate, or if the folder's scan is another one,
    FileExistsError if it holds one and `resume` is False or another process works on it, UnsupportedModelError for
    models that cannot be scored. On KeyboardInterrupt what is done is written before it is raised again.
    """
    if isinstance(trials, ScanTrials):
        composed = trials
        trials, config = composed.trials, composed.config | (config or {})
    folder = ScanFolder(Path(out))
    what = {**method.as_config(), **describe_model(model), **model_identity(model), **(config or {})}
    attempts = Attempts(model, tokenizer, method)
    with folder.locked():
        before = folder.share_prefixes() if resume else None
        share = share_prefixes if before is None else before
        manifest = Manifest.of(what, trials, share_prefixes=share)
        if repaired := folder.begin(manifest.as_dict(), resume=resume):
            notice(repaired)
        tree = trial_tree(trials, "all")
        mine = (shard or Shard(0, 1)).slice_of(list(tree.sequences()))
        writer = Writer(folder, manifest, mine, progress)
        skip = writer.not_to_run()
        if share and (reason := cannot_share(model)):
            notice(f"{reason}; each trial is run on its own")
        walk = _walk(model, trials, tree, method.token_chunk, skip, notice) if share else _alone(tree, skip)
        try:
            for numbers, prefix in walk:
                outcomes = attempts.attempt([trials[number] for number in numbers], prefix)
                for number, outcome in zip(numbers, outcomes, strict=True):
                    if number not in skip:
                        writer.add(number, outcome)
        finally:
            writer.flush()
        if "scored" not in writer.status.values():
            raise NothingCountsError.of(folder, _replies(attempts, writer))
        return conclude(folder)


def _replies(attempts: Attempts, writer: Writer) -> dict[str, str]:
    """What the model says to some of the trials that it gets wrong, by their keys."""
    keyed = zip(writer.manifest.keys, writer.manifest.trials, strict=True)
    wrong = [(key, trial) for key, trial in keyed if writer.status.get(key) == "gated"]
    return {key: attempts.reply(trial) for key, trial in wrong[:SHOWN_REPLIES]}


class Writer:
    """Collects outcomes and writes them every few trials or seconds."""

    def __init__(
        self, folder: ScanFolder, manifest: Manifest, mine: list[int], progress: Callable[[Progress], None]
    ) -> None:
        self.folder, self.manifest, self.mine, self.progress = folder, manifest, mine, progress
        self.status: dict[str, Status] = {key: line["status"] for key, line in folder.lines().items()}
        self.lines: list[dict[str, Any]] = []
        self.arrays: dict[str, Arrays] = {}
        self.tried: set[int] = set()  # in this run
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
        self.tried.add(number)
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
            done=sum(i in self.tried or state in DONE for i, state in zip(self.mine, states, strict=True)),
            total=len(self.mine),
            passed=states.count("scored"),
            judged=states.count("scored") + states.count("gated"),
            run=self.run,
            tokens=self.tokens,
            seconds=time.monotonic() - self.started,
        )


def _walk(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    tree: PrefixNode,
    token_chunk: int | None,
    skip: set[int],
    notice: Callable[[str], None],
) -> Iterator[Group]:
    """Trials behind their shared beginnings; each on its own from where memory does not suffice for those."""
    handed = set(skip)
    try:
        for group in behind_shared_prefixes(model, trials, tree, token_chunk=token_chunk, skip=skip):
            handed.update(group.trials)
            yield group
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # out here, where the error no longer holds the cache
    notice("memory does not suffice for what prompts share; the other trials are run each on its own")
    yield from _alone(tree, handed)


def _alone(tree: PrefixNode, skip: set[int]) -> Iterator[Group]:
    return (Group([number], None) for number in tree.sequences() if number not in skip)
