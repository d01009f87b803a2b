"""A scan whose shared beginnings do not fit into memory says so, and runs each trial on its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from locos_fast import HeadScores, planted
from locos_fast.cli.input import beginnings_fit
from locos_fast.models import memory_estimate
from locos_fast.models.loading import ModelSource
from tests.cli.test_scan import folder, run  # noqa: F401  (folder is a fixture)
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


def test_what_a_model_generates_is_kept_as_well(folder):  # noqa: F811
    trials = [planted.build(**MODEL).trial(100, "literal", depth=100, seed=seed) for seed in (0, 0)]
    source = ModelSource(str(folder / "model"), device="cpu")
    plain, generating = (beginnings_fit(source, trials, reply_tokens).needed for reply_tokens in (0, 50))
    text = source.config()
    per_token = 4 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # float32, keys and values
    assert generating.cache - plain.cache == 50 * per_token > 0
    assert generating.activations > plain.activations


def test_several_devices_are_left_to_the_run(folder):  # noqa: F811
    assert beginnings_fit(ModelSource(str(folder / "model"), device_map="auto"), []) is None
