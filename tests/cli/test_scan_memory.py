"""A scan whose shared beginnings do not fit into memory says so, and runs each trial on its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from locos_fast import HeadScores, Trial, planted
from locos_fast.cli.input import _side_by_side, beginnings_fit, load_model
from locos_fast.models import memory_estimate
from locos_fast.models.loading import ModelSource
from locos_fast.scoring import shared_prefixes
from locos_fast.scoring.prompt_parts import first_row
from locos_fast.scoring.shared_prefixes import behind_shared_prefixes, trial_tree
from tests.cli.test_scan import folder  # noqa: F401  (a fixture)
from tests.oracles.entry_point import run
from tests.oracles.planted_scan import MODEL, scan_command


def prefix_tokens(out: Path) -> set[int]:
    return {json.loads(line)["prefix_tokens"] for line in (out / "trials.jsonl").read_text().splitlines()}


@pytest.fixture
def free(monkeypatch):
    """Let just that much memory be free, as a share of the way from a run without cache to one with it."""
    fits = memory_estimate.fits_with_cache

    def only(share: float) -> None:
        def limited(*given):
            *arguments, shared = given
            ways = list(shared)
            needed = fits(*arguments, ways).needed
            room = needed.total - needed.cache + int(share * needed.cache)
            monkeypatch.setattr(memory_estimate, "available", lambda device: room)
            return fits(*arguments, ways)

        monkeypatch.setattr(memory_estimate, "fits_with_cache", limited)

    return only


def test_without_room_for_the_cache_each_trial_is_run_on_its_own(capsys, monkeypatch, folder, tmp_path, free):  # noqa: F811
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "shared"))
    assert code == 0 and "memory" not in err and max(prefix_tokens(tmp_path / "shared")) > 0
    free(0.5)
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "alone"))
    assert code == 0 and "each trial is run on its own" in err
    assert prefix_tokens(tmp_path / "alone") == {0}
    shared, alone = (HeadScores.from_pretrained(tmp_path / name).score for name in ("shared", "alone"))
    assert np.nanmax(abs(shared - alone)) <= 1e-5 * np.nanmax(abs(alone))  # float32, the same sums in another order


def test_with_just_enough_room_they_are_shared(capsys, monkeypatch, folder, tmp_path, free):  # noqa: F811
    free(1)
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    assert code == 0 and "memory" not in err and max(prefix_tokens(tmp_path / "x")) > 0


def test_what_does_not_even_fit_without_is_refused(capsys, monkeypatch, folder, tmp_path, free):  # noqa: F811
    free(-1)
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    assert code == 2 and "memory: this run needs about" in err and "on its own" not in err


def cache_per_token(source: ModelSource) -> int:
    """Bytes: float32, keys and values."""
    text = source.config()
    return 4 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def trials_of(seeds: tuple[int, ...]) -> list[Trial]:
    model = planted.build(**MODEL)
    return [model.trial(100, "literal", depth=100, seed=seed) for seed in seeds]


def test_what_a_model_generates_is_kept_as_well(folder):  # noqa: F811
    trials, source = trials_of((0, 0)), ModelSource(str(folder / "model"), device="cpu")
    short, long = (beginnings_fit(source, trials, reply_tokens).needed for reply_tokens in (20, 70))
    assert long.cache - short.cache == 50 * cache_per_token(source) > 0
    assert long.activations > short.activations


def test_a_reply_to_a_prompt_that_shares_nothing_is_kept_with_its_prompt(folder):  # noqa: F811
    [trial], source = trials_of((0,)), ModelSource(str(folder / "model"), device="cpu")
    assert beginnings_fit(source, [trial]).needed.cache == 0
    generating = beginnings_fit(source, [trial], 50).needed
    assert generating.cache == (len(trial.prompt_ids) + 50) * cache_per_token(source)


def test_loading_counts_the_cache_of_a_reply(folder, monkeypatch):  # noqa: F811
    source = ModelSource(str(folder / "model"), device="cpu")
    _, plain = load_model(source, 150, "lengths")
    _, generating = load_model(source, 150, "lengths", reply_tokens=50)
    assert generating - plain == 150 * cache_per_token(source)
    monkeypatch.setattr(memory_estimate, "available", lambda device: generating - 1)
    load_model(source, 150, "lengths")
    with pytest.raises(ValueError, match=r"memory: this run needs about .*149 tokens would fit"):
        load_model(source, 150, "lengths", reply_tokens=50)


def test_copies_for_answers_side_by_side_are_counted(folder, monkeypatch):  # noqa: F811
    """As many as the walk runs in one pass, beside the beginning they start from."""
    [trial], source = trials_of((0,)), ModelSource(str(folder / "model"), device="cpu")
    per_token, whole = cache_per_token(source), len(trial.prompt_ids) + len(trial.answer_ids)
    beginning = first_row(trial, "all")
    for count in (2, 8, 9):
        needed = beginnings_fit(source, [trial] * count).needed
        assert needed.cache == (beginning + min(count, 8) * whole) * per_token
    monkeypatch.setattr(shared_prefixes, "TOGETHER_BYTES", 3 * beginning * per_token)
    assert beginnings_fit(source, [trial] * 8).needed.cache == (beginning + 3 * whole) * per_token
    monkeypatch.setattr(shared_prefixes, "SHORT", 0)
    assert beginnings_fit(source, [trial] * 8).needed.cache == whole * per_token


def test_rows_counted_are_those_that_the_walk_runs(folder):  # noqa: F811
    """Trials on three contexts, which have their first token in common."""
    network, trials = planted.build(**MODEL), trials_of((0,) * 8 + (1,) * 6 + (2,) * 5)
    tree, run_together = trial_tree(trials, "all"), {}
    for group in behind_shared_prefixes(network.model, trials, tree, token_chunk=None):
        run_together |= dict.fromkeys(group.trials, len(group.trials))
    counted = _side_by_side(tree, [len(trial.prompt_ids) + len(trial.answer_ids) for trial in trials])
    assert dict(zip(tree.sequences(), counted, strict=True)) == run_together
    assert set(run_together.values()) == {8, 6, 5}


def test_several_devices_are_left_to_the_run(folder):  # noqa: F811
    assert beginnings_fit(ModelSource(str(folder / "model"), device_map="auto"), []) is None
