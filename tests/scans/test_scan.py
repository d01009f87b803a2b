"""A scan finds what single trials find, keeps it, and goes on where it stopped, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from locos_fast import HeadScores, LocosScorer, planted
from locos_fast.planted.trials import planted_trials
from locos_fast.prompts.trials import Trial
from locos_fast.scans import attempt
from locos_fast.scans.attempt import Method
from locos_fast.scans.manifest import Manifest, Shard
from locos_fast.scans.merge import merge
from locos_fast.scans.run import Progress, scan
from locos_fast.scans.store import ScanFolder
from locos_fast.scoring.head_scores import ARRAYS
from tests.oracles.planted_trials import make_trials
from tests.oracles.scores import assert_same
from tests.scans.conftest import LENGTH


def bytes_of(folder: Path) -> bytes:
    return (folder / "scores.safetensors").read_bytes()


def stop_after(count: int):
    """A `progress` that presses Ctrl-C after that many trials."""
    seen = []

    def progress(now: Progress) -> None:
        seen.append(now)
        if len(seen) == count:
            raise KeyboardInterrupt

    return progress


def test_means_are_those_of_trials_scored_one_by_one(model, trials, tmp_path: Path) -> None:
    found = scan(model.model, model.tokenizer, trials, tmp_path / "x").scores
    alone = [LocosScorer(model.model, model.tokenizer).score(trial, detectors="all") for trial in trials]
    assert "locos_frozen" in found.names
    assert_same(found, HeadScores.mean(alone))
    kept = HeadScores.from_pretrained(tmp_path / "x")
    assert kept.per_trial.shape == (8, *found.score.shape)
    assert (kept.ci_low <= kept.score + 1e-6).all() and (kept.score <= kept.ci_high + 1e-6).all()
    assert kept.meta["trials"] == {"planned": 8, "scored": 8} and kept.meta["gate_rate"] == 1


def test_a_data_set_brings_what_its_trials_depend_on(model, tmp_path: Path) -> None:
    composed = planted_trials(model.tokenizer, "literal", lengths=[LENGTH], depths=2, limit=4)
    found = scan(model.model, model.tokenizer, composed, tmp_path, config={"why": "to see"})
    assert found.statuses == {"scored": 4}
    assert found.scores.meta["dataset"] == "planted" and found.scores.meta["why"] == "to see"


def test_trials_that_the_model_answers_wrong_do_not_count(model, trials, tmp_path: Path) -> None:
    wrong = planted.trial(LENGTH, "literal", depth=50, seed=99)
    other = next(t.answer_ids for t in trials if t.answer_ids != wrong.answer_ids)
    object.__setattr__(wrong, "answer_ids", other)
    gated = scan(model.model, model.tokenizer, [*trials, wrong], tmp_path / "gate")
    assert gated.statuses == {"scored": 8, "gated": 1}
    assert sum(cell.ended - cell.passed for cell in gated.cells) == 1
    assert_same(gated.scores, scan(model.model, model.tokenizer, trials, tmp_path / "right").scores)
    everything = scan(model.model, model.tokenizer, [*trials, wrong], tmp_path / "open", method=Method(gate=False))
    assert everything.statuses == {"scored": 9}


def test_no_trial_that_counts_is_an_error_that_shows_what_was_said(model, trials, tmp_path: Path) -> None:
    object.__setattr__(trials[0], "answer_ids", [trials[0].answer_ids[0] + 1])
    with pytest.raises(ValueError, match=f"no trial counts \\(1 gated\\): for '{trials[0].answer}' the model says"):
        scan(model.model, model.tokenizer, trials[:1], tmp_path / "x")


def test_an_interrupted_scan_keeps_what_is_done_and_resumes_to_the_byte(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "whole")
    for count in (1, 5):
        out = tmp_path / str(count)
        with pytest.raises(KeyboardInterrupt):
            scan(model.model, model.tokenizer, trials, out, progress=stop_after(count))
        assert len(ScanFolder(out).lines()) == count
        seen: list[Progress] = []
        scan(model.model, model.tokenizer, trials, out, resume=True, progress=seen.append)
        assert [now.done for now in seen] == list(range(count + 1, 9))
        assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_shards_share_the_trials_out_and_merge_to_the_byte(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "whole")
    parts = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    for number, part in enumerate(parts):
        found = scan(model.model, model.tokenizer, trials, part, shard=Shard(number, 3))
        assert found.statuses["scored"] + found.statuses["open"] == 8
    merged = merge(parts, tmp_path / "all")
    assert merged.statuses == {"scored": 8}
    assert bytes_of(tmp_path / "all") == bytes_of(tmp_path / "whole")
    assert (tmp_path / "all" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()


def test_a_scan_resumes_its_own_configuration_and_trials_only(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "x", config={"seed": 1})
    with pytest.raises(FileExistsError, match="already holds a scan; --resume"):
        scan(model.model, model.tokenizer, trials, tmp_path / "x", config={"seed": 1})
    with pytest.raises(ValueError, match=r'norm was "none", is "frozen"$'):
        scan(
            model.model,
            model.tokenizer,
            trials,
            tmp_path / "x",
            config={"seed": 2},
            method=Method(norm="frozen"),
            resume=True,
        )
    with pytest.raises(ValueError, match=r"not among those asked for \(1 of 8\): seed was 1, is 2"):
        scan(model.model, model.tokenizer, trials[1:], tmp_path / "x", config={"seed": 2}, resume=True)
    scan(model.model, model.tokenizer, trials, tmp_path / "y", method=Method(norm="frozen"))
    with pytest.raises(ValueError, match='y holds a scan with another configuration: norm was "none", is "frozen"'):
        merge([tmp_path / "x", tmp_path / "y"], tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_a_second_process_is_refused(model, trials, tmp_path: Path) -> None:
    with (
        ScanFolder(tmp_path / "x").locked(),
        pytest.raises(FileExistsError, match="another process is working on this scan"),
    ):
        scan(model.model, model.tokenizer, trials, tmp_path / "x")


def test_a_folder_of_other_results_is_left_alone(model, trials, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="choose another folder"):
        scan(model.model, model.tokenizer, trials, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_half_written_last_line_is_cut_off_and_its_trial_run_again(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path)
    before, lines = bytes_of(tmp_path), tmp_path / "trials.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    said: list[str] = []
    assert scan(model.model, model.tokenizer, trials, tmp_path, resume=True, notice=said.append).statuses["scored"] == 8
    assert len(said) == 1 and "half-written" in said[0]
    assert bytes_of(tmp_path) == before


def test_a_damaged_line_is_named(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    (tmp_path / "trials.jsonl").write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"trials\.jsonl, line 2: no trial"):
        scan(model.model, model.tokenizer, trials, tmp_path, resume=True)


def test_a_scan_of_another_schema_is_refused(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 1, got 99"):
        scan(model.model, model.tokenizer, trials, tmp_path, resume=True)


def lacking_memory(monkeypatch: pytest.MonkeyPatch, which: Trial, *, times: int) -> list[int | None]:
    """Scoring the trial `which` runs out of memory that many times; returns the chunks it was tried with."""
    real, chunks = attempt.score_prompts, []

    def score(model, prompts, *arguments, **options):
        if len(prompts) == 1 and torch.equal(prompts[0].input_ids, which.input_ids):
            chunks.append(options["token_chunk"])
            if len(chunks) <= times:
                torch.empty(2**60, dtype=torch.uint8)  # more than any machine has
        return real(model, prompts, *arguments, **options)

    monkeypatch.setattr(attempt, "score_prompts", score)
    return chunks


def test_a_trial_that_lacks_memory_is_tried_in_a_smaller_way(model, trials, tmp_path, monkeypatch) -> None:
    chunks = lacking_memory(monkeypatch, trials[2], times=1)
    assert scan(model.model, model.tokenizer, trials, tmp_path).statuses == {"scored": 8}
    assert chunks[1] == attempt.SMALL_TOKEN_CHUNK < chunks[0]


def test_a_trial_that_still_lacks_memory_is_recorded_and_tried_again_on_resume(
    model, trials, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        lacking_memory(patch, trials[2], times=2)
        assert scan(model.model, model.tokenizer, trials, tmp_path).statuses == {"scored": 7, "out-of-memory": 1}
    assert scan(model.model, model.tokenizer, trials, tmp_path, resume=True).statuses == {"scored": 8}


def test_trials_are_run_alone_where_memory_does_not_suffice_for_a_shared_beginning(
    model, trials, tmp_path, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("not enough")

    shared = [*trials, *make_trials(LENGTH, "non_literal", 8)]  # every two share what stands before the needle
    monkeypatch.setattr("locos_fast.models.prefix_cache.PrefixCache.extend", refuse)
    found = scan(model.model, model.tokenizer, shared, tmp_path)
    assert found.statuses == {"scored": 16}
    assert {line["prefix_tokens"] for line in ScanFolder(tmp_path).lines().values()} == {0}


def test_a_trial_that_fails_says_why_and_the_others_go_on(model, trials, tmp_path: Path) -> None:
    object.__setattr__(trials[3], "answer_ids", [10**6])  # no such token
    found = scan(model.model, model.tokenizer, trials, tmp_path)
    assert found.statuses == {"scored": 7, "failed": 1}
    failed = [line for line in ScanFolder(tmp_path).lines().values() if line["status"] == "failed"]
    assert failed[0]["reason"]


def test_frozen_scores_that_do_not_add_up_to_the_logit_do_not_count(model, trials, tmp_path, monkeypatch) -> None:
    assert scan(model.model, model.tokenizer, trials[:2], tmp_path / "x", method=Method(norm="frozen")).statuses == {
        "scored": 2
    }
    monkeypatch.setattr(attempt, "verdict_of", lambda *_: "wrong")
    with pytest.raises(ValueError, match=r"no trial counts \(2 failed\): completeness: "):
        scan(model.model, model.tokenizer, trials[:2], tmp_path / "y", method=Method(norm="frozen"))


def test_a_manifest_refuses_no_trials_and_the_same_one_twice(trials) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Manifest.of({}, [])
    with pytest.raises(ValueError, match="is there twice"):
        Manifest.of({}, [trials[0], trials[1], trials[0]])


@pytest.mark.parametrize("given", ["", "0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_outside_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="shard: expected I/N"):
        Shard.parse(given)


def test_old_score_folders_without_intervals_are_readable(model, trials, tmp_path: Path) -> None:
    LocosScorer(model.model, model.tokenizer).score(trials[0]).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "scores.safetensors")) == set(ARRAYS)
    assert HeadScores.from_pretrained(tmp_path).ci_low is None
    assert np.isfinite(HeadScores.from_pretrained(tmp_path).score).all()


def test_a_scan_that_is_continued_shares_as_it_did_before(model, trials, tmp_path: Path) -> None:
    """Whether the caches fit is asked anew at each start; what it shares must not depend on it."""
    shared = [*trials, *make_trials(LENGTH, "non_literal", 8)]  # every two share what stands before the needle
    scan(model.model, model.tokenizer, shared, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        scan(model.model, model.tokenizer, shared, tmp_path / "x", progress=stop_after(5))
    scan(model.model, model.tokenizer, shared, tmp_path / "x", resume=True, share_prefixes=False)
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")
    assert max(line["prefix_tokens"] for line in ScanFolder(tmp_path / "x").lines().values()) > 16
