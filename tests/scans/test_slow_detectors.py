"""Detectors that take more than the recorded pass: through a tuned lens, and by activation patching."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from locos_fast import HeadScores, planted
from locos_fast.causal.activation_patching import cri
from locos_fast.scans import attempt
from locos_fast.scans.attempt import Method
from locos_fast.scans.run import scan
from locos_fast.scans.store import ScanFolder
from locos_fast.scoring.tuned_lens import TunedLens
from tests.oracles.planted_trials import make_trials


def lens_of(model: planted.PlantedModel, size: float) -> TunedLens:
    hidden, generator = model.model.config.hidden_size, torch.Generator().manual_seed(0)
    layers = range(model.model.config.num_hidden_layers)
    noise = [size * torch.randn(hidden, hidden + 1, generator=generator) for _ in layers]
    return TunedLens({i: (noise[i][:, :hidden], noise[i][:, hidden]) for i in layers}, source="my.pt")


def test_a_scan_scores_through_a_lens(model, tmp_path) -> None:
    trials = make_trials(60, "literal", 2)
    found = scan(model.model, model.tokenizer, trials, tmp_path, method=Method(lens=lens_of(model, 0.0)))
    np.testing.assert_allclose(found.scores.others["locos_tuned_lens"], found.scores.score, rtol=0, atol=1e-6)
    assert found.scores.meta["tuned_lens_sha256"] == lens_of(model, 0.0).digest != lens_of(model, 1.0).digest


def test_a_lens_of_another_model_is_refused(model, tmp_path) -> None:
    other = TunedLens({0: (torch.zeros(4, 4), torch.zeros(4))}, source="my.pt")
    with pytest.raises(ValueError, match=r"my\.pt: "):
        scan(model.model, model.tokenizer, make_trials(60, "literal", 1), tmp_path, method=Method(lens=other))


def test_a_scan_patches_every_head_where_it_is_asked_to(model, tmp_path) -> None:
    trials = make_trials(60, "literal", 2)
    found = scan(model.model, model.tokenizer, trials, tmp_path, method=Method(cri=True)).scores
    filler = model.tokenizer(".", add_special_tokens=False)["input_ids"][-1]
    alone = [cri(model.model, trial, filler_id=filler) for trial in trials]
    np.testing.assert_allclose(found.others["cri"], np.mean(alone, 0), rtol=0, atol=1e-4)
    again = HeadScores.from_pretrained(tmp_path)
    assert set(again.top(3, by="cri")) == set(model.heads["literal"])
    assert json.loads((tmp_path / "config.json").read_text())["cri"] == "first_token_logit_diff"


def test_a_head_that_cannot_be_patched_costs_no_other_detector_its_score(model, tmp_path, monkeypatch) -> None:
    def lacks_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(attempt, "cri", lacks_memory)
    found = scan(model.model, model.tokenizer, make_trials(60, "literal", 2), tmp_path, method=Method(cri=True))
    assert found.statuses == {"scored": 2} and "cri" not in found.scores.names
    assert {line["cri_failed"] for line in ScanFolder(tmp_path).lines().values()} == {"not enough"}
