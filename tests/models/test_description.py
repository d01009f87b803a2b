"""What tells a model from another one: what it computes, not where it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from locos_fast import planted
from locos_fast.models.description import model_identity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "model"
    planted.build(layers=4).save_pretrained(path)
    return path


def load(folder: Path, **options: object) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, **options)


def test_the_same_model_in_another_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert model_identity(load(folder)) == model_identity(load(tmp_path / "copy"))


@pytest.mark.parametrize("change", ["scaled", "one head", "one number", "swapped"])
def test_other_weights_are_another_model(folder: Path, change: str) -> None:
    model = load(folder)
    before, weight = model_identity(model), model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        torch.nn.init.normal_(weight)
        changed = model_identity(model)
        assert changed["weights"] != before["weights"] and changed["architecture"] == before["architecture"]
        if change == "scaled":
            weight.mul_(0.9)
        elif change == "one head":
            weight[:, 128:256] = 0
        elif change == "one number":
            weight[-1, -1] += 1
        else:
            weight[[0, 1]] = weight[[1, 0]]
    assert model_identity(model)["weights"] != changed["weights"]


def test_a_large_tensor_is_added_up_in_parts_to_the_same_digest(folder: Path, monkeypatch) -> None:
    model = load(folder)
    whole = model_identity(model)
    monkeypatch.setattr("locos_fast.models.description.ELEMENTS", 1000)
    assert model_identity(model) == whole


def test_positions_turned_otherwise_are_another_model_and_attention_by_other_means_is_not(folder: Path) -> None:
    before = model_identity(load(folder))
    assert model_identity(load(folder, attn_implementation="eager")) == before
    turned = load(folder)
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 123.0}
    assert model_identity(turned)["architecture"] != before["architecture"]


def test_a_commit_of_the_hub_stands_for_the_weights(folder: Path) -> None:
    model = load(folder)
    model.config._commit_hash = "abc"
    assert model_identity(model)["weights"] == "commit abc"
