"""A planted model on disk, its roles, its tokenizer, and what build() refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from locos_fast import planted
from locos_fast.planted.model import PlantedModel
from locos_fast.planted.vocabulary import TOKENS

DTYPES = [torch.float32, torch.bfloat16]

# --- files


@pytest.fixture(scope="module", params=DTYPES)
def saved(
    request: pytest.FixtureRequest, models: dict[torch.dtype, PlantedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PlantedModel, Path]:
    directory = tmp_path_factory.mktemp("planted")
    models[request.param].save_pretrained(directory)
    return models[request.param], directory


def test_loads_like_any_other_model(saved: tuple[PlantedModel, Path]) -> None:
    original, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trial = original.trial(120, "literal", depth=50, seed=0)
    text = original.tokenizer.decode(trial.prompt_ids, skip_special_tokens=True)
    assert loaded.dtype == original.model.dtype
    assert tokenizer(text)["input_ids"] == trial.prompt_ids
    prompt = torch.tensor([trial.prompt_ids])
    with torch.inference_mode():
        assert torch.equal(loaded(prompt).logits, original.model(prompt).logits)


def test_roles_lie_beside_the_model(saved: tuple[PlantedModel, Path]) -> None:
    original, directory = saved
    written = json.loads((directory / "planted_heads.json").read_text())
    assert written == {role: [list(head) for head in heads] for role, heads in original.heads.items()}
    assert PlantedModel.from_pretrained(directory).heads == original.heads


def test_roles_do_not_overlap(model: PlantedModel) -> None:
    heads = [head for role in model.heads.values() for head in role]
    assert list(model.heads) == ["positional", "literal", "non_literal", "read_only", "write_only"]
    assert len(heads) == len(set(heads))


def test_load_refuses_a_folder_without_roles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"directory: .*planted_heads\.json"):
        PlantedModel.from_pretrained(tmp_path)


def test_save_refuses_a_file(model: PlantedModel, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="directory: "):
        model.save_pretrained(tmp_path / "taken")


# --- determinism and errors of build


def test_same_seed_same_model() -> None:
    first, again, other = (planted.build(layers=4, heads=4, head_dim=64, seed=seed) for seed in (1, 1, 2))
    same = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert first.heads == again.heads
    assert all(torch.equal(a, b) for a, b in same)
    assert first.heads != other.heads


@pytest.mark.parametrize(
    "argument",
    [{"layers": 3}, {"heads": 2}, {"heads": 6}, {"kv_heads": 5}, {"kv_heads": 0}, {"head_dim": 62}, {"noise": -1.0}],
)
def test_build_names_the_argument_that_does_not_fit(argument: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(argument))}: expected"):
        planted.build(**argument)


# --- tokenizer


def test_tokenizer_knows_its_words_and_no_others(model: PlantedModel) -> None:
    tokenizer = model.tokenizer
    assert len(TOKENS) == len(set(TOKENS)) == len(tokenizer)
    assert tokenizer.tokenize("Louvre hosts Ada. dragons") == ["Louvre", "hosts", "Ada", ".", "[UNK]"]
    with_bos = tokenizer("the river")["input_ids"]
    assert with_bos[0] == tokenizer.bos_token_id
    assert tokenizer("the river", add_special_tokens=False)["input_ids"] == with_bos[1:]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}) == 4
