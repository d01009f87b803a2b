"""A scan goes on with more trials, on other machines, and is one with others: where scores are made in the same way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from locos_fast import HeadScores, planted
from locos_fast.scans import run
from locos_fast.scans.attempt import Method
from locos_fast.scans.manifest import SCORING, Manifest, context_of, scoring_identity, trial_key
from locos_fast.scans.merge import merge
from locos_fast.scans.result import NothingCountsError, conclude, gate_rate
from locos_fast.scans.run import scan
from locos_fast.scans.store import ScanFolder
from locos_fast.scoring.tuned_lens import TunedLens
from tests.oracles.planted_trials import make_trials

LENS = TunedLens({0: (torch.eye(4), torch.zeros(4))})


def scores_of(folder: Path) -> bytes:
    return (folder / "scores.safetensors").read_bytes()


def wrong(trials: list, number: int) -> None:
    """Ask that trial for an answer that the model does not give."""
    object.__setattr__(trials[number], "answer_ids", trials[(number + 1) % len(trials)].answer_ids)
    assert trials[number].answer_ids != make_trials(80, "literal", 8)[number].answer_ids


def test_a_scan_gains_trials_and_ends_as_one_that_had_them_from_the_first(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "whole", config={"limit": 8, "seed": 1})
    scan(model.model, model.tokenizer, trials[1:5], tmp_path / "x", config={"limit": 4, "seed": 1})
    seen: list[run.Progress] = []
    scan(
        model.model,
        model.tokenizer,
        trials,
        tmp_path / "x",
        config={"limit": 8, "seed": 1},
        resume=True,
        progress=seen.append,
    )
    assert [now.done for now in seen] == [5, 6, 7, 8]  # four were there
    assert scores_of(tmp_path / "x") == scores_of(tmp_path / "whole")
    meta = HeadScores.from_pretrained(tmp_path / "x").meta
    assert meta["limit"] == 8 and meta["earlier"] == [{"limit": 4}]
    assert "earlier" not in HeadScores.from_pretrained(tmp_path / "whole").meta


def test_device_versions_paths_and_grid_describe_and_do_not_decide() -> None:
    (trial,) = make_trials(80, "literal", 1)
    config = {"norm": "none", "dtype": "float32", "weights": "w"}
    described = config | {"device": "cuda:1", "versions": {"torch": "9"}, "haystack": "../x", "limit": 9, "depths": [1]}
    assert trial_key(trial, config) == trial_key(trial, described)
    for name in ("norm", "dtype", "weights"):
        assert trial_key(trial, config) != trial_key(trial, config | {name: "other"})
    assert trial_key(trial, config) != trial_key(dataclasses.replace(trial, foil_ids=[1]), config)


@pytest.mark.parametrize("method", [Method(cri=True, lens=LENS), Method("generate", "frozen", gate=False)])
def test_all_that_a_method_says_decides(method: Method) -> None:
    assert set(method.as_config()) <= set(SCORING)
    assert scoring_identity(method.as_config()) == method.as_config()


def test_other_weights_in_the_same_place_are_refused(model, trials, tmp_path: Path) -> None:
    other = planted.build(layers=4).model
    scan(other, model.tokenizer, trials[:2], tmp_path / "x")
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight.mul_(0.9)
    with pytest.raises(ValueError, match='weights was "digest '):
        scan(other, model.tokenizer, trials[:2], tmp_path / "x", resume=True)


def test_a_refused_resume_leaves_the_manifest(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="not among those asked for"):
        scan(model.model, model.tokenizer, trials[1:], tmp_path, resume=True)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_shards_of_several_devices_are_merged_and_both_described(model, trials, tmp_path: Path, monkeypatch) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "whole")
    real = run.describe_model
    for number, device in enumerate(("cpu", "cuda:1")):
        monkeypatch.setattr(run, "describe_model", lambda m, device=device: real(m) | {"device": device})
        scan(model.model, model.tokenizer, trials, tmp_path / device, shard=run.Shard(number, 2))
    merged = merge([tmp_path / "cpu", tmp_path / "cuda:1"], tmp_path / "all")
    assert scores_of(tmp_path / "all") == scores_of(tmp_path / "whole")
    assert (merged.scores.meta["device"], merged.scores.meta["earlier"]) == ("cpu", [{"device": "cuda:1"}])


def test_scans_of_other_trials_are_united_in_order(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "whole")
    scan(model.model, model.tokenizer, trials[:5], tmp_path / "a")
    scan(model.model, model.tokenizer, trials[3:], tmp_path / "b")
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all").statuses == {"scored": 8}
    assert scores_of(tmp_path / "all") == scores_of(tmp_path / "whole")
    found = [json.loads((tmp_path / name / "manifest.json").read_text())["trials"] for name in ("all", "whole")]
    assert found[0] == found[1]


def test_packed_and_single_contexts_are_not_mixed(model, trials, tmp_path: Path) -> None:
    for number, mode in enumerate(("single", "packed")):
        scan(model.model, model.tokenizer, trials[number : number + 2], tmp_path / mode, config={"contexts": mode})
    with pytest.raises(ValueError, match='contexts was "single", is "packed"'):
        merge([tmp_path / "single", tmp_path / "packed"], tmp_path / "all")


def test_merging_where_nothing_counts_leaves_no_folder(model, trials, tmp_path: Path) -> None:
    for number in (0, 1):
        wrong(trials, number)
        with pytest.raises(NothingCountsError):
            scan(model.model, model.tokenizer, trials[number : number + 1], tmp_path / str(number))
    with pytest.raises(ValueError, match=r"merge: in all parts together no trial counts \(2 gated\): for '"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merging_into_a_part_or_a_scan_is_refused(model, trials, tmp_path: Path) -> None:
    for name in "ab":
        scan(model.model, model.tokenizer, trials[:2], tmp_path / name)
    with pytest.raises(ValueError, match=r"out: expected a new folder, got .* which is one of the parts"):
        merge([tmp_path / "a"], tmp_path / "x" / ".." / "a")
    with pytest.raises(FileExistsError, match="b already holds a scan; choose another folder"):
        merge([tmp_path / "a"], tmp_path / "b")


def test_a_trial_that_one_part_scored_and_another_gated_counts(model, trials, tmp_path: Path) -> None:
    for name in "ab":
        scan(model.model, model.tokenizer, trials[:2], tmp_path / name)
    lines = (tmp_path / "a" / "trials.jsonl").read_text().splitlines()
    gated = {k: v for k, v in json.loads(lines[0]).items() if k not in ("arrays", "names")} | {"status": "gated"}
    (tmp_path / "a" / "trials.jsonl").write_text("\n".join([json.dumps(gated), *lines[1:]]) + "\n")
    assert merge([tmp_path / "a"], tmp_path / "alone").statuses == {"scored": 1, "gated": 1}
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both").statuses == {"scored": 2}


def test_a_shared_context_is_one_sample(model, tmp_path: Path) -> None:
    trial = make_trials(80, "literal", 1)[0]
    asked = [dataclasses.replace(trial, question_span=(70, 80), id=str(number)) for number in range(2)]
    other = dataclasses.replace(asked[1], prompt_ids=[*trial.prompt_ids[:79], trial.prompt_ids[0]])
    assert context_of(asked[0]) == context_of(other) != context_of(trial)
    entries = Manifest.of({}, [asked[0], other]).as_dict()["trials"]
    assert entries[0]["context"] == entries[1]["context"] and entries[0]["key"] != entries[1]["key"]


def test_intervals_of_a_scan_draw_contexts(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path)
    kept = json.loads((tmp_path / "manifest.json").read_text())
    for number, entry in enumerate(kept["trials"]):
        entry["context"] = f"{number // 4}"
    (tmp_path / "manifest.json").write_text(json.dumps(kept))
    assert np.isnan(conclude(ScanFolder(tmp_path)).scores.ci_low).all()  # eight trials, two contexts


def test_the_gate_rate_says_what_was_right_whether_or_not_it_counts(model, trials, tmp_path: Path) -> None:
    scan(model.model, model.tokenizer, trials[:4], tmp_path, method=Method(gate=False))
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    lines[0]["right"] = False
    for line in lines[2:]:  # as lines were before they said so
        line.pop("right", None)
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = conclude(ScanFolder(tmp_path))
    assert found.statuses == {"scored": 4} and gate_rate(found.cells) == 0.75 == found.scores.meta["gate_rate"]
    assert sum(cell["passed"] for cell in found.scores.meta["gate_rate_by_cell"]) == 3


def test_whether_beginnings_are_shared_is_kept_beside_the_configuration(trials, tmp_path: Path) -> None:
    folder, config = ScanFolder(tmp_path / "x"), {"norm": "none"}
    assert folder.share_prefixes() is None
    shared, not_said = (Manifest.of(config, trials[:2], share_prefixes=given) for given in (False, None))
    assert shared.keys == not_said.keys and shared.as_dict()["share_prefixes"] is False
    with folder.locked():
        folder.begin(shared.as_dict(), resume=False)
        folder.begin(not_said.as_dict(), resume=True)
    assert folder.share_prefixes() is False


def test_trials_of_each_detector_are_counted(model, trials, tmp_path: Path) -> None:
    foil = next(t for t in trials[1:] if t.answer_ids != trials[0].answer_ids)
    some = [dataclasses.replace(trials[0], foil=foil.answer, foil_ids=foil.answer_ids)]
    some += [dataclasses.replace(trial, foil=None, foil_ids=None) for trial in trials[1:]]
    counts = scan(model.model, model.tokenizer, some, tmp_path).scores.meta["trials_by_detector"]
    assert (counts["score"], counts["locos_foil"]) == (8, 1)
