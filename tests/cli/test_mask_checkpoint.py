"""The command mask-checkpoint: a folder without the heads, or one line and exit code 2 and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from locos_fast.scoring.head_scores import ARRAYS, HeadScores
from tests.oracles.entry_point import run
from tests.oracles.tiny_models import build

SCORE = np.arange(12.0).reshape(3, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, scores of it and of another one, and a file of another project."""
    folder = tmp_path_factory.mktemp("place")
    build("llama").save_pretrained(folder / "model", max_shard_size="20KB")
    for name, score in (("scan", SCORE), ("other", SCORE.reshape(4, 3))):
        arrays = dict.fromkeys(ARRAYS, score) | {"dla": -score}
        HeadScores.of(arrays).save_pretrained(folder / name)
    (folder / "wu.json").write_text(json.dumps({"1-1": [0.5, 1.0], "1-2": [0.9]}))
    return folder


def command(place: Path, masked: Path, **options) -> list[str]:
    given = {"model": place / "model", "heads": "0-1,L2H3", "out": masked} | options
    return ["mask-checkpoint", *(f"--{name}={value}" for name, value in given.items())]


def silent_heads(folder: Path) -> list[str]:
    """Of which all columns are zero: 16 of each of the 4 heads."""
    weights = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    projections = [weights[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in range(3)]
    return [
        f"{layer}-{head}"
        for layer, projection in enumerate(projections)
        for head in range(4)
        if not projection[:, 16 * head : 16 * head + 16].any()
    ]


@pytest.mark.parametrize(
    "options, heads",
    [
        ({}, ["0-1", "2-3"]),
        ({"heads": "{}/scan", "k": 2}, ["2-2", "2-3"]),
        ({"heads": "{}/scan", "k": 2, "by": "dla"}, ["0-0", "0-1"]),
        ({"heads": "{}/wu.json", "k": 1}, ["1-2"]),
    ],
)
def test_the_heads_named_are_silent(capsys, monkeypatch, place, tmp_path, options, heads):
    options = {name: str(value).format(place) for name, value in options.items()}
    code, out, _ = run(capsys, monkeypatch, command(place, tmp_path / "masked", **options))
    assert code == 0
    assert silent_heads(tmp_path / "masked") == heads
    assert all(f"L{head.replace('-', 'H')}" in out for head in heads)
    assert "weight files rewritten" in out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": "3-0"}, "heads: the model has no softmax-attention head 3-0; it has 3 layers of 4 heads"),
        ({"heads": ""}, "heads: expected a list such as 18-6,23-2"),
        ({"heads": "{}/none"}, "heads: expected a list such as 18-6,23-2, a score folder or a file"),
        ({"heads": "{}/scan"}, "k: {}/scan ranks 12 heads"),
        ({"heads": "{}/scan", "k": 13}, "k: expected 1 to 12"),
        ({"heads": "{}/scan", "k": 0}, "--k"),
        ({"heads": "{}/scan", "k": 1, "by": "locos"}, "by: expected one of score"),
        ({"heads": "{}/other", "k": 1}, "holds scores of 4 layers of 3 heads, the model has 3 layers of 4 heads"),
        ({"model": "{}/none"}, "model: no folder"),
        ({"model": "{}/scan"}, "model: "),
        ({"out": ""}, "expected a folder, got nothing"),
        ({"out": "{}/model"}, "holds files that are no masked checkpoint's"),
        ({"out": "{}/wu.json"}, "is a file, not a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, monkeypatch, place, tmp_path, options, message):
    options = {name: str(value).format(place) for name, value in options.items()}
    before = sorted(place.rglob("*"))
    code, out, err = run(capsys, monkeypatch, command(place, tmp_path / "masked", **options))
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.format(place) in err
    assert not list(tmp_path.iterdir()) and sorted(place.rglob("*")) == before


def test_a_masked_checkpoint_is_replaced_only_when_asked(capsys, monkeypatch, place, tmp_path):
    assert run(capsys, monkeypatch, command(place, tmp_path / "masked"))[0] == 0
    again = command(place, tmp_path / "masked", heads="1-1")
    code, _, err = run(capsys, monkeypatch, again)
    assert code == 2 and "already holds a masked checkpoint; choose another folder or overwrite it" in err
    assert silent_heads(tmp_path / "masked") == ["0-1", "2-3"]
    assert run(capsys, monkeypatch, [*again, "--overwrite"])[0] == 0
    assert silent_heads(tmp_path / "masked") == ["1-1"]
