"""The command line: right results, and one clear line with exit code 2 for everything that can be wrong with the
input."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from transformers import AutoConfig, FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM

from locos_fast.planted.model import build
from locos_fast.scoring.head_scores import HeadScores
from tests.oracles.entry_point import run


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with the planted model, a context that contains the needle, and what to ask."""
    folder = tmp_path_factory.mktemp("planted")
    model = build(layers=4)
    model.save_pretrained(folder / "model")
    trial = model.trial(200, "literal", depth=40, seed=3)
    start, end = trial.needle_span
    words = model.tokenizer.convert_ids_to_tokens(trial.prompt_ids)
    question = trial.question.split()
    (folder / "with.txt").write_text(" ".join(words[1 : -len(question)]), encoding="utf-8")
    (folder / "without.txt").write_text(" ".join(words[1:start] + words[end : -len(question)]), encoding="utf-8")
    return folder, model, trial


def arguments(planted, **changes: str | None) -> list[str]:
    folder, _, trial = planted
    options: dict[str, str | None] = {
        "model": str(folder / "model"),
        "context": str(folder / "with.txt"),
        "needle": trial.needle,
        "question": trial.question,
        "answer": trial.answer,
        "device": "cpu",
    } | changes
    return ["score", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None)]


def test_score_finds_the_planted_heads_in_json(capsys, monkeypatch, planted):
    folder, model, trial = planted
    code, out, _ = run(
        capsys, monkeypatch, [*arguments(planted, top="3", out=str(folder / "scores")), "--json", "--verify"]
    )
    result = json.loads(out)
    assert code == 0
    assert {head["head"] for head in result["heads"]} == {f"{layer}-{head}" for layer, head in model.heads["literal"]}
    assert result["meta"]["answer_tokens"] == [trial.answer]
    assert result["meta"]["answer_ids"] == trial.answer_ids
    first = result["heads"][0]
    assert first["score"] == pytest.approx(first["l_plus"] - first["l_minus"])
    saved = HeadScores.from_pretrained(folder / "scores")
    assert set(saved.found()) == set(model.heads["literal"])
    assert (folder / "scores" / "heads.png").stat().st_size > 1000


def test_timing_prints_seconds_and_peak_memory(capsys, monkeypatch, planted):
    code, out, _ = run(capsys, monkeypatch, [*arguments(planted), "--timing"])
    assert code == 0
    assert re.search(r"forward [\d.e-]+ s, scoring [\d.e-]+ s \([\d.]+% of the forward\), peak memory", out)
    _, out, _ = run(capsys, monkeypatch, arguments(planted))
    assert "peak memory" not in out


def test_depth_inserts_the_needle(capsys, monkeypatch, planted):
    folder, model, trial = planted
    command = arguments(planted, context=str(folder / "without.txt"), depth="60", top="3")
    code, out, _ = run(capsys, monkeypatch, [*command, "--json"])
    result = json.loads(out)
    assert code == 0
    assert {head["head"] for head in result["heads"]} == {f"{layer}-{head}" for layer, head in model.heads["literal"]}
    [[start, end]] = result["meta"]["needle_spans"]
    assert end - start == len(trial.needle.split())
    assert 0.4 < start / result["meta"]["tokens"] < 0.7


def test_the_table_names_heads_and_tokens(capsys, monkeypatch, planted):
    _, model, trial = planted
    code, out, _ = run(capsys, monkeypatch, arguments(planted))
    layer, head = model.heads["literal"][0]
    assert code == 0
    assert f"L{layer}H{head}" in out
    assert trial.answer in out


def test_an_answer_the_model_would_not_give_is_said_so(capsys, monkeypatch, planted):
    _, _, trial = planted
    other = next(name for name in ("Elena", "Marcus") if name != trial.answer)
    code, out, _ = run(capsys, monkeypatch, arguments(planted, answer=other))
    assert code == 0
    assert "would not have answered" in out


BAD = {
    "empty needle": ({"needle": " "}, "needle: expected text"),
    "empty answer": ({"answer": ""}, "answer: expected text"),
    "empty question": ({"question": ""}, "question: expected text"),
    "needle not found": ({"needle": "nobody was here"}, "needle: not found"),
    "needle found twice": ({"needle": "."}, "needle: found more than once"),
    "needle longer than the context": ({"needle": "word " * 5000}, "longer than the context"),
    "depth below 0": ({"depth": "-1"}, "depth: expected percent"),
    "depth above 100": ({"depth": "100.5"}, "depth: expected percent"),
    "no context file": ({"context": "missing.txt"}, "context: no file"),
    "unknown model path": ({"model": "./no/such/model"}, "model: no folder"),
    "unknown dtype": ({"dtype": "int3"}, "dtype: expected"),
    "unknown device": ({"device": "warp"}, "device: 'warp' cannot be used"),
    "needle already there": ({"depth": "50"}, "needle: already in the context"),
    "device and device map": ({"device_map": "auto"}, "give --device or --device-map"),
    "unknown attention": ({"attn_implementation": "telepathy"}, "model: cannot load"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, planted, case):
    changes, message = BAD[case]
    output = planted[0] / "not-written"
    code, out, err = run(capsys, monkeypatch, arguments(planted, out=str(output), **changes))
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not output.exists()


def test_a_context_that_is_not_utf8_is_refused(capsys, monkeypatch, planted, tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    code, _, err = run(capsys, monkeypatch, arguments(planted, context=str(tmp_path / "latin.txt")))
    assert (code, "not UTF-8" in err) == (2, True)


def test_an_empty_context_is_refused(capsys, monkeypatch, planted, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    code, _, err = run(capsys, monkeypatch, arguments(planted, context=str(tmp_path / "empty.txt")))
    assert (code, "context: expected text" in err) == (2, True)


def test_an_empty_model_folder_is_refused(capsys, monkeypatch, planted, tmp_path):
    code, _, err = run(capsys, monkeypatch, arguments(planted, model=str(tmp_path)))
    assert (code, "holds no config.json" in err) == (2, True)


def test_truncated_weights_are_refused(capsys, monkeypatch, planted, tmp_path):
    for file in (planted[0] / "model").iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    code, _, err = run(capsys, monkeypatch, arguments(planted, model=str(tmp_path)))
    assert (code, "model: cannot load" in err) == (2, True)
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "model_class", "message"),
    [
        (
            FalconConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=128),
            FalconForCausalLM,
            "FalconAttention computes attention itself",
        ),
        (
            MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=128, state_size=4),
            MambaForCausalLM,
            "MambaForCausalLM has no softmax attention",
        ),
    ],
    ids=["falcon", "mamba"],
)
def test_models_that_cannot_be_recorded_are_named(capsys, monkeypatch, planted, tmp_path, config, model_class, message):
    config.vocab_size = AutoConfig.from_pretrained(planted[0] / "model").vocab_size
    model_class(config).save_pretrained(tmp_path)
    for file in (planted[0] / "model").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _, err = run(capsys, monkeypatch, arguments(planted, model=str(tmp_path)))
    assert code == 2
    assert message in err


def test_a_folder_that_holds_scores_is_kept_unless_told(capsys, monkeypatch, planted, tmp_path):
    assert run(capsys, monkeypatch, arguments(planted, out=str(tmp_path)))[0] == 0
    before = (tmp_path / "scores.safetensors").read_bytes()
    code, _, err = run(capsys, monkeypatch, arguments(planted, out=str(tmp_path)))
    assert (code, "already holds scores" in err) == (2, True)
    assert (tmp_path / "scores.safetensors").read_bytes() == before
    assert run(capsys, monkeypatch, [*arguments(planted, out=str(tmp_path)), "--overwrite"])[0] == 0


def test_a_run_that_cannot_fit_is_refused_before_loading(capsys, monkeypatch, planted):
    from locos_fast.models import memory_estimate

    monkeypatch.setattr(memory_estimate, "available", lambda device: 1000)
    code, _, err = run(capsys, monkeypatch, arguments(planted))
    assert (code, "memory: this run needs about" in err) == (2, True)
    assert "not even the weights and one token fit" in err


def test_a_prompt_longer_than_the_model_can_take_is_refused(capsys, monkeypatch, planted, tmp_path):
    (tmp_path / "long.txt").write_text("word . " * 70_000)
    command = arguments(planted, context=str(tmp_path / "long.txt"), depth="50")
    code, _, err = run(capsys, monkeypatch, command)
    assert (code, "longer than the model's 131072 positions" in err) == (2, True)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(planted):
    from tokenizers.processors import TemplateProcessing

    from locos_fast.prompts.compose import compose

    folder, model, trial = planted
    text = {"needle": trial.needle, "question": trial.question, "answer": trial.answer}
    context = (folder / "with.txt").read_text()
    plain = compose(model.tokenizer, context=context, **text)
    ending = type(model.tokenizer).from_pretrained(folder / "model")
    special = [(token, ending.convert_tokens_to_ids(token)) for token in (ending.bos_token, ending.eos_token)]
    template = f"{ending.bos_token} $A {ending.eos_token}"
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    assert ending("word")["input_ids"][-1] == ending.eos_token_id
    composed = compose(ending, context=context, **text)
    assert (composed.prompt_ids, composed.answer_ids) == (plain.prompt_ids, plain.answer_ids)


def test_bos_is_not_doubled_when_the_text_already_begins_with_it(planted):
    from locos_fast.prompts.compose import compose

    folder, model, trial = planted
    text = {"needle": trial.needle, "question": trial.question, "answer": trial.answer}
    context = (folder / "with.txt").read_text()
    plain = compose(model.tokenizer, context=context, **text)
    templated = compose(model.tokenizer, context=f"{model.tokenizer.bos_token} {context}", **text)
    assert plain.prompt_ids.count(model.tokenizer.bos_token_id) == 1
    assert (templated.prompt_ids, templated.needle_span) == (plain.prompt_ids, plain.needle_span)
    assert templated.answer_ids == plain.answer_ids


def test_planted_writes_a_model_and_keeps_an_old_one(capsys, monkeypatch, tmp_path):
    assert run(capsys, monkeypatch, ["planted", str(tmp_path / "model")])[0] == 0
    assert (tmp_path / "model" / "planted_heads.json").is_file()
    code, _, err = run(capsys, monkeypatch, ["planted", str(tmp_path / "model")])
    assert (code, "already holds a model" in err) == (2, True)


def test_version_is_printed():
    command = [sys.executable, "-m", "locos_fast", "--version"]
    from locos_fast import __version__

    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == __version__
