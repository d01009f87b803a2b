"""A scan survives `kill -9` at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from locos_fast import planted
from locos_fast.planted.vocabulary import FILLERS, LANDMARKS, NAMES
from locos_fast.prompts.needle_grid import Grid, needle_trials
from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack
from locos_fast.scans import run
from locos_fast.scans.store import ScanFolder
from tests.oracles.threads import one_thread

PAUSE = 0.05  # seconds after each trial, so that a kill hits the middle of the scan on every machine
TRIALS = 24


def in_a_process_killed_after(seconds: float, work) -> int:
    """Run `work` in a forked process and kill it; returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_three_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run, "FLUSH_TRIALS", 2)
    model = planted.build(layers=4)
    facts = [
        Fact(name, f"{p} hosts {name} .", f"who {p} ANSWER", name) for name, p in zip(NAMES, LANDMARKS, strict=True)
    ]
    rng = random.Random(0)
    text = " ".join(" ".join(rng.choices(FILLERS, k=8)) + " ." for _ in range(30))
    composer, haystack = Composer(model.tokenizer, chat_template=False), Haystack.of(model.tokenizer, text)
    trials = needle_trials(composer, {"": haystack}, facts, Grid([120, 200], [0, 50, 100]), limit=TRIALS, name="own")

    def work() -> None:
        run.scan(
            model.model, model.tokenizer, trials, tmp_path / "killed", resume=True, progress=lambda _: time.sleep(PAUSE)
        )

    with one_thread():
        run.scan(model.model, model.tokenizer, trials, tmp_path / "whole")
        for _ in range(3):
            moment = random.Random().uniform(0, PAUSE * TRIALS / 3)  # differs from run to run: no moment may matter
            assert in_a_process_killed_after(moment, work) == -signal.SIGKILL
        before = len(ScanFolder(tmp_path / "killed").lines())
        found = run.scan(model.model, model.tokenizer, trials, tmp_path / "killed", resume=True)
    assert before < TRIALS and found.statuses == {"scored": TRIALS}
    shared = [line["prefix_tokens"] for line in ScanFolder(tmp_path / "whole").lines().values()]
    assert max(shared) > 100  # trials did continue from shared beginnings
    for name in ("scores.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
