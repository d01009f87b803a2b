"""A masked checkpoint is the model under ablation, and the rest of its folder is the source's to the byte."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from locos_fast import __version__, mask_checkpoint
from locos_fast.causal.ablation import ablate
from locos_fast.causal.masked_checkpoint import PROVENANCE
from locos_fast.models import loading
from locos_fast.models.built_in import SIZES_FILE
from locos_fast.models.loading import ModelSource
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.tiny_models import SMALL, tokens
from tests.oracles.tiny_tokenizers import byte_level

HEADS = [(0, 1), (2, 3), (2, 0)]  # layers 0 and 2 attend in every family
SHARD = "20KB"  # of a model of some 100 KB
NAMES = "model.layers.{}.self_attn.o_proj.weight"


def saved(folder: Path, family: str = "llama", **options) -> Path:
    build(family, dtype=torch.float32).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A sharded Llama with everything that stands beside weights, and some things that do not belong to it."""
    folder = saved(tmp_path_factory.mktemp("source") / "model", max_shard_size=SHARD)
    byte_level("the blue key opens the gate").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("do what you like")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / SIZES_FILE).write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same in another layout")
    (folder / "checkpoints").mkdir()
    return folder


@torch.inference_mode()
def logits(model):
    return model(tokens(2, 17), use_cache=False).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_masked_checkpoint_is_the_ablated_model(tmp_path, family, sharded):
    """To the bit where rounding allows: zeros in the weight and zeros in what it reads add the same zeros."""
    folder = saved(tmp_path / "model", family, **({"max_shard_size": SHARD} if sharded else {}))
    done = mask_checkpoint(folder, HEADS, tmp_path / "masked")
    assert len(done.rewritten) + len(done.unchanged) == len(list(folder.glob("*.safetensors")))
    if sharded:
        assert done.unchanged and len(done.rewritten) <= 2
    intact = load(folder)
    with ablate(intact, HEADS, mode="output-zero"):
        expected = logits(intact)
    found = logits(load(tmp_path / "masked"))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (logits(intact) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_only_the_columns_of_the_heads_differ_and_biases_stay(tmp_path):
    folder = saved(tmp_path / "model", "granite")
    before = load_file(folder / "model.safetensors")
    mask_checkpoint(folder, HEADS, tmp_path / "masked")
    after = load_file(tmp_path / "masked" / "model.safetensors")
    width = 8  # 32 channels of 4 heads
    assert before[NAMES.format(0).replace("weight", "bias")].any()
    for layer, head in HEADS:
        before[NAMES.format(layer)][:, head * width : (head + 1) * width] = 0
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_masked_in_place(tmp_path, dtype):
    build("gpt2").to(dtype).save_pretrained(tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    mask_checkpoint(tmp_path / "model", [(1, 2)], tmp_path / "masked")
    after = load_file(tmp_path / "masked" / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["transformer.h.1.attn.c_proj.weight"]
    assert after[changed[0]].dtype == dtype
    zero = (after[changed[0]] == 0).all(1).nonzero()[:, 0].tolist()  # Conv1D: input features are rows
    assert zero == [*range(16, 24)]


def test_names_may_lack_the_prefix_of_the_model(tmp_path):
    """Many a published GPT-2 was saved without its language-model head."""
    folder = saved(tmp_path / "model", "gpt2")
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    done = mask_checkpoint(folder, [(1, 2)], tmp_path / "masked")
    assert done.parameters == ["h.1.attn.c_proj.weight"]
    intact = load(folder)
    with ablate(intact, [(1, 2)]):
        torch.testing.assert_close(logits(load(tmp_path / "masked")), logits(intact))


def test_unchanged_files_are_linked_and_the_rest_of_the_folder_comes_along(source, tmp_path):
    done = mask_checkpoint(source, [(1, 0)], tmp_path / "deep" / "masked")
    folder = done.folder
    assert len(done.rewritten) == 1 and len(done.unchanged) > 2
    for name in done.unchanged:
        assert (folder / name).samefile(source / name)
    assert not (folder / done.rewritten[0]).samefile(source / done.rewritten[0])
    beside = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
    beside += ["tokenizer_config.json", "chat_template.jinja", "LICENSE"]
    assert {file.name for file in folder.iterdir()} == {*done.rewritten, *done.unchanged, *beside, PROVENANCE}
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in beside)
    assert [entry.name for entry in folder.parent.iterdir()] == ["masked"]  # nothing else is left there
    assert folder.stat().st_mode == folder.parent.stat().st_mode


def test_files_are_copied_where_links_are_impossible(source, tmp_path, monkeypatch):
    def link(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    done = mask_checkpoint(source, [(1, 0)], tmp_path / "masked")
    for name in done.unchanged:
        assert sha256(done.folder / name) == sha256(source / name)
        assert not (done.folder / name).samefile(source / name)


def test_the_source_is_not_touched(source, tmp_path):
    before = {file.name: sha256(file) for file in source.iterdir() if file.is_file()}
    mask_checkpoint(source, HEADS, tmp_path / "masked")
    mask_checkpoint(source, [(1, 1)], tmp_path / "masked", overwrite=True)
    assert {file.name: sha256(file) for file in source.iterdir() if file.is_file()} == before


def test_the_provenance_says_what_was_done_to_what(source, tmp_path):
    done = mask_checkpoint(source, HEADS, tmp_path / "masked")
    said = json.loads((done.folder / PROVENANCE).read_text())
    assert said["heads"] == ["0-1", "2-0", "2-3"]
    assert said["parameters"] == [NAMES.format(0), NAMES.format(2)] == done.parameters
    assert said["locos_fast"] == __version__
    assert said["source"]["model"] == str(source) and said["source"]["commit"] is None
    assert said["source"]["sha256"] == {name: sha256(source / name) for name in done.rewritten}
    assert said["sha256"] == {file.name: sha256(file) for file in sorted(done.folder.glob("*.safetensors"))}


def test_a_masked_checkpoint_can_be_masked_further_and_says_so(source, tmp_path):
    mask_checkpoint(source, [(0, 1)], tmp_path / "one")
    done = mask_checkpoint(tmp_path / "one", [(2, 3)], tmp_path / "two")
    said = json.loads((done.folder / PROVENANCE).read_text())
    assert said["heads"] == ["2-3"] and said["source"]["masked_heads"]["heads"] == ["0-1"]
    both = load(mask_checkpoint(source, [(0, 1), (2, 3)], tmp_path / "both").folder)
    assert torch.equal(logits(load(done.folder)), logits(both))


def test_a_hub_model_is_masked_in_what_was_downloaded(source, tmp_path, monkeypatch):
    cache = tmp_path / "models--who--what" / "snapshots" / "0123abc"
    shutil.copytree(source, cache)
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        return str(cache)

    config = ModelSource(str(source)).config()
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(loading.ModelSource, "config", lambda self: config)
    done = mask_checkpoint("who/what", [(0, 0)], tmp_path / "masked", revision="main")
    said = json.loads((done.folder / PROVENANCE).read_text())["source"]
    assert asked == [("who/what", "main")]
    assert (said["model"], said["revision"], said["commit"]) == ("who/what", "main", "0123abc")


def test_a_folder_that_holds_something_is_not_written_over(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds files that are no masked checkpoint's"):
            mask_checkpoint(source, HEADS, tmp_path / "full", overwrite=overwrite)
        with pytest.raises(FileExistsError, match="is a file, not a folder"):
            mask_checkpoint(source, HEADS, tmp_path / "file", overwrite=overwrite)
        with pytest.raises(FileExistsError, match="no masked checkpoint's"):
            mask_checkpoint(source, HEADS, source, overwrite=overwrite)
    (tmp_path / "masked").mkdir()  # an empty one will do
    done = mask_checkpoint(source, HEADS, tmp_path / "masked")
    first = sha256(done.folder / PROVENANCE)
    with pytest.raises(FileExistsError, match="already holds a masked checkpoint"):
        mask_checkpoint(source, [(0, 0)], done.folder)
    assert sha256(done.folder / PROVENANCE) == first
    with pytest.raises(FileExistsError, match="is the checkpoint to be masked"):
        mask_checkpoint(done.folder, [(0, 0)], done.folder, overwrite=True)
    assert mask_checkpoint(source, [(0, 0)], done.folder, overwrite=True).heads == [(0, 0)]
    assert sha256(done.folder / PROVENANCE) != first
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "full", "masked"]


def refused(model: Path, message: str, heads=((0, 0),)) -> None:
    with pytest.raises(ValueError, match=message):
        mask_checkpoint(model, heads, model.parent / "masked")
    assert [entry.name for entry in model.parent.iterdir()] == [model.name]


def test_heads_that_the_model_does_not_have_are_refused(source):
    refused(source, "heads: the model has no softmax-attention head 3-0; it has 3 layers of 4 heads", [(3, 0)])
    refused(source, "heads: expected at least one head", [])


def test_packed_quantised_weights_are_refused_and_plain_ones_beside_them_are_not(tmp_path):
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    packed = torch.zeros(32 * 64 // 2, 1, dtype=torch.uint8)
    weights |= {NAMES.format(0): packed, "model.layers.1.self_attn.o_proj.qweight": packed.clone()}
    del weights[NAMES.format(1)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    reason = r"the checkpoint is quantised \(gptq\), which packs numbers or scales several of them together"
    refused(folder, rf"layers.0.* cannot be masked: it is stored as U8 \[1024, 1\], for {reason}")
    refused(folder, rf"layers.1.* cannot be masked: the files hold no weight of that name, for {reason}", [(1, 0)])
    assert mask_checkpoint(folder, [(2, 0)], tmp_path / "masked").parameters == [NAMES.format(2)]


def test_a_model_whose_layers_share_one_projection_is_refused(tmp_path, monkeypatch):
    class Shared(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            layers = self.model.layers
            layers[2].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight

    folder = saved(tmp_path / "model")
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, LlamaConfig, Shared)
    refused(folder, f"{NAMES.format(0)} and {NAMES.format(2)} are one weight, shared by several layers")
    assert mask_checkpoint(folder, [(1, 0)], tmp_path / "masked").parameters == [NAMES.format(1)]


def test_a_projection_whose_columns_are_not_known_is_refused(tmp_path, monkeypatch):
    class Other(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].self_attn.o_proj = nn.Bilinear(4, 4, 4)

    folder = saved(tmp_path / "model")
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, LlamaConfig, Other)
    refused(folder, "the output projection of layer 0 is a Bilinear; only the columns of Linear and Conv1D are known")


def test_a_name_that_fits_two_weights_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weight = weights.pop(NAMES.format(0))
    names = ["decoder.layers.0.self_attn.o_proj.weight", "encoder.layers.0.self_attn.o_proj.weight"]
    save_file(weights | {name: weight.clone() for name in names}, folder / "model.safetensors")
    refused(folder, f"{NAMES.format(0)} may be {names[0]} or {names[1]} in the files")


def test_an_adapter_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter, which adds to the projections .* merge it into its base first")


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(
        folder, "has no model.safetensors and no model.safetensors.index.json; other files of weights are not masked"
    )


def test_a_missing_or_damaged_file_of_weights_is_refused(tmp_path):
    folder = saved(tmp_path / "model", max_shard_size=SHARD)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(folder, f"model: cannot read .*{shard.name}: ")
    shard.unlink()
    refused(folder, f"lacks the file '{shard.name}', which its model.safetensors.index.json names")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    refused(folder, "lacks the file '../secret.safetensors'")
    index.write_text("[]")
    refused(folder, "model: cannot read model.safetensors.index.json of")


def test_nothing_is_left_where_writing_fails(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("locos_fast.causal.masked_checkpoint.zero_slices", full)
    with pytest.raises(OSError, match="no space left"):
        mask_checkpoint(source, HEADS, tmp_path / "masked")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tmp_path, tied):
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    done = mask_checkpoint(tmp_path / "model", [(1, 1)], tmp_path / "masked")
    masked, intact = load(done.folder), load(tmp_path / "model")
    assert (masked.lm_head.weight is masked.model.embed_tokens.weight) == tied
    with ablate(intact, [(1, 1)]):
        torch.testing.assert_close(logits(masked), logits(intact))


@pytest.mark.real
def test_the_built_in_model_becomes_an_ordinary_folder_without_the_heads(tmp_path):
    heads = [(18, 6), (23, 2), (20, 6)]
    done = mask_checkpoint("smollm2", heads, tmp_path / "masked")
    model, tokenizer = loading.load("smollm2", device="cpu")
    masked = AutoModelForCausalLM.from_pretrained(done.folder)
    ids = tokenizer("The special magic number for Laura is 48213. " * 3, return_tensors="pt").input_ids
    with torch.inference_mode():
        intact = model(ids).logits
        with ablate(model, heads, mode="output-zero"):
            expected = model(ids).logits
        found = masked(ids).logits
    assert (found - expected).abs().max() <= 1e-6
    assert (found - intact).abs().max() > 1e-2 * expected.abs().max()
    assert json.loads((done.folder / PROVENANCE).read_text())["source"]["model"] == "smollm2"
    assert not (done.folder / SIZES_FILE).exists()
