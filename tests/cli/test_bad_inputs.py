"""Bad input of every kind: exit code 2, one line on stderr that says what is wrong, nothing on stdout, nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cli.test_cli import run

WORDS = "the blue key opens north gate what red door . ?".split()
NEEDLE, QUESTION, ANSWER = "the blue key opens the north gate .", "what opens the north gate ?", "the blue key"
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and its tokenizer, and beside it a context that holds the needle."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "context.txt").write_text(f"the red door . {NEEDLE} the door .")
    return folder


class Place:
    """One case's copy of the model; what it breaks, and the options it changes."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.folder, self.model, self.out = folder, folder / "model", folder / "results" / "out"
        shutil.copytree(tiny / "model", self.model)
        shutil.copy(tiny / "context.txt", folder)

    def command(self, name: str, **changes: Any) -> list[str]:
        given: dict[str, Any] = {"model": self.model, "device": "cpu"}
        if name == "score":
            given |= {"context": self.folder / "context.txt", "needle": NEEDLE, "question": QUESTION}
        if name == "attribute":
            given |= {"prompt": self.folder / "context.txt"}
        if name != "doctor":
            given |= {"answer": ANSWER, "out": self.out}
        given |= {key.replace("_", "-"): str(value).format(here=self.folder) for key, value in changes.items()}
        return [name, *(f"--{key}={value}" for key, value in given.items() if value != "None")]

    def edit(self, file: str, **changes: Any) -> None:
        path = self.model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def config(**changes: Any) -> Callable[[Place], None]:
    return lambda place: place.edit("config.json", **changes)


def text(file: str, content: str) -> Callable[[Place], Any]:
    return lambda place: (place.model / file).write_text(content)


def fill(name: str, value: float) -> Callable[[Place], None]:
    return lambda place: place.weights(lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def drop(start: str) -> Callable[[Place], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    return lambda place: place.weights(change)


def pickled(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, place.model / "pytorch_model.bin")


def evil(place: Place) -> None:
    (place.model / "evil.py").write_text(f"open({str(place.folder / 'RAN')!r}, 'w')\nclass Evil: ...\n")


def evil_model(place: Place) -> None:
    evil(place)
    place.edit(
        "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    )


def evil_tokenizer(place: Place) -> None:
    evil(place)
    place.edit("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]})


def large_ids(place: Place) -> None:
    tokenizer = json.loads((place.model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["gate"] = 5000
    (place.model / "tokenizer.json").write_text(json.dumps(tokenizer))


MODELS: dict[str, tuple[Callable[[Place], Any], str]] = {
    "config.json is empty": (text("config.json", ""), "config.json"),
    "config.json is no JSON": (text("config.json", "{,"), "config.json"),
    "config.json is a number": (text("config.json", "5"), "config.json"),
    "config.json is null": (text("config.json", "null"), "config.json"),
    "config.json is a list": (text("config.json", "[1]"), "config.json"),
    "no model type": (text("config.json", "{}"), "config.json"),
    "unknown model type": (config(model_type="nothing"), "config.json"),
    "model type is a list": (config(model_type=["llama"]), "config.json"),
    "hidden size is a word": (config(hidden_size="abc"), "hidden_size"),
    "hidden size is null": (config(hidden_size=None), "config.json"),
    "hidden size is negative": (config(hidden_size=-16), "config.json"),
    "no KV heads": (config(num_key_value_heads=0), "config.json"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "unknown rope type": (config(rope_parameters={"rope_type": "warp", "rope_theta": 1.0}), "warp"),
    "rope parameters are a number": (config(rope_parameters=3), "config.json"),
    "unknown activation": (config(hidden_act="glow"), "glow"),
    "unknown layer types": (config(layer_types=["a", "b"]), "config.json"),
    "dtype is a method of torch": (config(dtype="load"), "model:"),
    "dtype is a number": (config(dtype=3), "model:"),
    "too many layers": (config(num_hidden_layers=10_000_000), "num_hidden_layers: expected at most 10000"),
    "endless layers": (config(num_hidden_layers=float("inf")), "num_hidden_layers: expected at most 10000"),
    "layers without weights": (config(num_hidden_layers=3), "lacks weights"),
    "vocabulary of another size": (config(vocab_size=99), "model: cannot load"),
    "unknown quantisation": (config(quantization_config={"quant_method": "magic"}), "'magic' is unknown"),
    "quantisation is a list": (config(quantization_config=[4]), "quantization_config"),
    "attention from the hub": (config(attn_implementation="some/kernel"), "code from the hub"),
    "attention is unknown": (config(attn_implementation="telepathy"), "model:"),
    "code of its own": (evil_model, "asks for code of its own"),
    "weights are a pickle": (pickled, "is a pickle"),
    "no weights": (lambda place: (place.model / "model.safetensors").unlink(), "model: cannot load"),
    "weights are empty": (text("model.safetensors", ""), "model: cannot load"),
    "weights are garbage": (text("model.safetensors", "x" * 999), "model: cannot load"),
    "index is garbage": (
        lambda place: (place.model / "model.safetensors").rename(place.model / "model.safetensors.index.json"),
        "model: cannot load",
    ),
    "a tensor is missing": (drop(f"{LAYER}self_attn.o_proj"), f"would be drawn at random: {LAYER}"),
    "a layer is missing": (drop(LAYER), "and 6 more"),
    "a weight is NaN": (fill(f"{LAYER}self_attn.q_proj.weight", float("nan")), f"{LAYER}self_attn.q_proj.weight holds"),
    "a weight is infinite": (fill("lm_head.weight", float("inf")), "lm_head.weight holds NaN or infinity"),
    "weights overflow": (fill("model.norm.weight", 3e38), "logits are not finite"),
}  # fmt: skip

TOKENIZERS: dict[str, tuple[Callable[[Place], Any], str]] = {
    "tokenizer.json is empty": (text("tokenizer.json", ""), "tokenizer"),
    "tokenizer.json is a list": (text("tokenizer.json", "[]"), "tokenizer"),
    "tokenizer.json of an unknown model": (
        text("tokenizer.json", '{"version": "1.0", "model": {"type": "Magic"}, "added_tokens": []}'),
        "tokenizer",
    ),
    "tokenizer_config.json is a list": (text("tokenizer_config.json", "[1]"), "tokenizer"),
    "tokenizer_config.json is garbage": (text("tokenizer_config.json", "{"), "tokenizer"),
    "tokenizer code of its own": (evil_tokenizer, "asks for code of its own"),
    "tokenizer of another model": (large_ids, "gives token id 5000, the model's vocabulary has 12"),
}

OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty folder name": ("score", {"out": ""}, "expected a folder"),
    "empty folder name for attribute": ("attribute", {"out": ""}, "expected a folder"),
    "results below a file": ("score", {"out": "{here}/context.txt/x"}, "context.txt"),
    "results where nobody can write": ("attribute", {"out": "/proc/results"}, "/proc/results"),
    "results with too long a name": ("score", {"out": "{here}/" + "x" * 300}, "too long"),
    "results into the model": ("score", {"out": "{here}/model"}, "not of scores"),
    "lone surrogate in the needle": ("score", {"needle": "caf\udce9"}, "needle: expected UTF-8"),
    "lone surrogate in the question": ("score", {"question": "caf\udce9"}, "question: expected UTF-8"),
    "lone surrogate in the answer": ("score", {"answer": "caf\udce9"}, "answer: expected UTF-8"),
    "lone surrogate in a path": ("score", {"context": "caf\udce9"}, "context: no file"),
    "escape sequence in a model's name": ("doctor", {"model": "./\x1b[31mred[/red]"}, r"\x1b[31mred[/red]"),
    "line break in a model's name": ("doctor", {"model": "./a\nb"}, "model: no folder"),
    "context is a folder": ("score", {"context": "{here}"}, "context: no file"),
    "depth is no number": ("score", {"depth": "half"}, "depth"),
    "depth is NaN": ("score", {"depth": "nan"}, "depth"),
    "top is none": ("score", {"top": 0}, "top"),
    "no model": ("doctor", {"model": None}, "--model"),
    "no context": ("score", {"context": None}, "--context"),
    "unknown flag": ("doctor", {"colour": "red"}, "--colour"),
    "unknown dtype": ("doctor", {"dtype": "int4"}, "dtype: expected"),
    "attention from the hub, asked for": ("doctor", {"attn_implementation": "some/kernel"}, "code from the hub"),
    "unknown device": ("doctor", {"device": "warp"}, "device: 'warp' cannot be used"),
    "unknown device map": ("doctor", {"device": None, "device_map": "warp"}, "model: cannot load"),
}


@pytest.fixture
def place(tiny, tmp_path) -> Place:
    return Place(tiny, tmp_path)


@pytest.fixture
def refused(capsys, monkeypatch, place):
    """Run a command that must fail: exit code 2, one line with `message`, nothing printed or left behind."""

    def check(command: list[str], message: str) -> None:
        before = sorted(place.folder.rglob("*"))
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
        code, out, err = run(capsys, monkeypatch, command)
        assert (code, out) == (2, ""), err
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("error: ") and message in err
        assert "\x1b" not in err
        assert sorted(place.folder.rglob("*")) == before

    return check


@pytest.mark.parametrize("command", ["doctor", "score", "attribute"])
def test_the_tiny_model_itself_is_fine(capsys, monkeypatch, place, command):
    assert run(capsys, monkeypatch, place.command(command))[0] == 0


@pytest.mark.parametrize("command", ["doctor", "score"])
@pytest.mark.parametrize("case", MODELS)
def test_a_broken_model_is_refused(refused, place, case, command):
    spoil, message = MODELS[case]
    spoil(place)
    refused(place.command(command), message)


@pytest.mark.parametrize("command", ["attribute", "score"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer_is_refused(refused, place, case, command):
    spoil, message = TOKENIZERS[case]
    spoil(place)
    refused(place.command(command), message)


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_are_refused(refused, place, case):
    command, changes, message = OPTIONS[case]
    refused(place.command(command, **changes), message)


@pytest.mark.parametrize("length", ["1000000000", "131073", "3", "-5", "many"])
def test_lengths_that_the_planted_model_has_not_are_refused(refused, place, length):
    refused(["demo", f"--out={place.out}", f"--length={length}"], "length")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("name", ["model", "context.txt"])
def test_planted_replaces_only_what_it_wrote(refused, place, name, flags):
    refused(["planted", str(place.folder / name), *flags], name)


@pytest.mark.parametrize("name", ["pl[/red]", "[red]x", "a\x1b[31mb", "$\\frac{$"])
def test_names_are_shown_as_they_are_but_for_control_characters(capsys, monkeypatch, place, name):
    (place.folder / name).parent.mkdir(exist_ok=True)  # one holds a slash
    renamed = place.model.rename(place.folder / name)
    out = place.folder / f"{name}-out"
    command = place.command("score", model=str(renamed).replace("{", "{{"), out=str(out).replace("{", "{{"))
    code, printed, err = run(capsys, monkeypatch, command)
    assert (code, err) == (0, "")
    assert (out / "heads.png").is_file()
    assert "\x1b[31m" not in printed
    code, printed, _ = run(capsys, monkeypatch, ["doctor", f"--model={renamed}", "--device=cpu"])
    assert code == 0 and "\x1b[31m" not in printed


def test_weights_that_the_model_does_not_use_are_a_warning(capsys, monkeypatch, place):
    place.weights(lambda tensors: tensors.update(stranger=torch.zeros(2)))
    code, _, err = run(capsys, monkeypatch, place.command("doctor"))
    assert (code, len(err.strip().splitlines())) == (0, 1)
    assert "does not use: stranger" in err


def test_code_runs_only_when_asked_for(capsys, monkeypatch, place):
    evil_model(place)
    run(capsys, monkeypatch, place.command("doctor"))
    assert not (place.folder / "RAN").exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(place.folder / "cache"))
    code, _, _ = run(capsys, monkeypatch, [*place.command("doctor"), "--trust-remote-code"])
    assert (code, (place.folder / "RAN").exists()) == (2, True)  # it ran, and is no configuration
