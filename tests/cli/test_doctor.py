"""`doctor` says what a model's layers are and how exactly they are scored; `score` acts on what it finds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.scoring import diagnosis
from locos_fast.scoring import targets as scoring
from locos_fast.scoring.diagnosis import diagnose, random_prompt, verdict, verdict_of
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.logit_units import Attribution, attribute_heads
from tests.cli import test_cli
from tests.cli.test_cli import arguments, run
from tests.oracles import architecture_models
from tests.oracles.tiny_models import WINDOW, build, tokens

planted = test_cli.planted  # a fixture


def folder(tmp_path, family: str) -> str:
    """A tiny model's folder; no tokenizer in it."""
    architecture_models.build(family, "eager", dtype=torch.float32).save_pretrained(tmp_path / family)
    return str(tmp_path / family)


def doctor(capsys, monkeypatch, model: str, *options: str) -> str:
    code, out, err = run(capsys, monkeypatch, ["doctor", f"--model={model}", "--device=cpu", *options])
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    ("family", "after"), [("gemma3", ""), ("gpt_oss", " (sinks)")], ids=["gemma3", "gpt_oss with sinks"]
)
def test_doctor_describes_every_layer(capsys, monkeypatch, tmp_path, family, after):
    options = ["--attn-implementation=eager"]
    result = json.loads(doctor(capsys, monkeypatch, folder(tmp_path, family), *options, "--json"))
    kinds = [f"sliding {WINDOW}{after}", f"full{after}", f"sliding {WINDOW}{after}"]
    assert [layer["kind"] for layer in result["layers"]] == kinds
    for layer in result["layers"]:
        shape = [layer[name] for name in ("heads", "kv_heads", "head_dim", "value_dim")]
        assert (shape, layer["verdict"], layer["reason"]) == ([4, 2, 16, 16], "exact", None)
        assert layer["residual"] < 1e-5
    assert (result["verdict"], result["frozen_refused"], result["backend"]) == ("exact", None, "torch")
    assert (result["attn_implementation"], result["dtype"]) == ("eager", "float32")
    assert result["residual"] < 1e-5


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_doctor_prints_a_table_and_a_summary(capsys, monkeypatch, tmp_path, family):
    monkeypatch.setattr("locos_fast.cli.options.console.width", 140, raising=False)
    out = doctor(capsys, monkeypatch, folder(tmp_path, family), "--attn-implementation=eager")
    rows = [line for line in out.splitlines() if "exact" in line and ("sliding 8" in line or "full" in line)]
    assert len(rows) == 3
    assert "whole model: exact" in out
    assert "attention eager, float32, backend torch" in out


def test_doctor_names_caps_latent_shared_and_linear_layers():
    def kinds(family: str) -> list[str]:
        return [layer.kind for layer in diagnose(architecture_models.build(family)).layers]

    assert kinds("deepseek_v3") == ["full (latent)"] * 3
    assert kinds("gemma4")[2:] == [f"sliding {WINDOW} (shared KV)", "full (shared KV)"]
    assert kinds("llama4") == [f"chunked {WINDOW}", "full", f"chunked {WINDOW}"]
    assert kinds("mistral") == [f"sliding {WINDOW}"] * 3
    linear = diagnose(architecture_models.build("qwen3_next")).layers[1]
    assert (linear.kind, linear.heads, linear.verdict) == ("linear", None, "not scored")
    assert diagnose(architecture_models.build("gemma4")).softcap == 5.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4)),
            "MambaForCausalLM has no softmax attention layers",
        ),
        (
            FalconForCausalLM(FalconConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=64)),
            "FalconAttention computes attention itself",
        ),
    ],
    ids=["mamba", "falcon"],
)
def test_doctor_refuses_what_cannot_be_recorded_in_one_line(capsys, monkeypatch, tmp_path, model, message):
    model.save_pretrained(tmp_path)
    code, out, err = run(capsys, monkeypatch, ["doctor", f"--model={tmp_path}", "--device=cpu"])
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def multiply(module: nn.Module, factor: float) -> None:
    """A multiplier that nothing declares, on what a module gives."""

    def times(module: nn.Module, args: tuple, output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    module.register_forward_hook(times)


@pytest.mark.parametrize("place", ["self_attn", "self_attn.o_proj", "input_layernorm"])
def test_a_hidden_multiplier_is_never_called_exact(place):
    model = build("llama")
    multiply(model.model.layers[1].get_submodule(place), 1.5)
    found = diagnose(model)
    if place == "input_layernorm":  # in front of the attention it is part of what the heads read
        assert found.verdict == "exact"
    elif found.frozen_refused is not None:
        assert "layer 1" in found.frozen_refused
    else:
        assert [layer.verdict for layer in found.layers] == ["exact", "wrong", "exact"]
        assert found.layers[1].reason == "heads and biases do not add up to what the layer writes"
        assert found.verdict == "wrong"


def test_a_path_that_cannot_be_followed_leaves_the_published_score():
    model = build("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: output.square())
    found = diagnose(model)
    assert "cannot be pulled back" in found.frozen_refused
    assert {layer.verdict for layer in found.layers} == {"published score only"}
    assert (found.verdict, found.residual) == ("published score only", None)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_model_that_cannot_be_recorded_raises():
    with pytest.raises(UnsupportedModelError, match="no softmax attention"):
        diagnose(MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4)).eval())


@pytest.mark.parametrize("length", [1, 3, 40])
def test_a_prompt_of_any_length_will_do(length):
    assert diagnose(build("llama"), tokens(1, length)).verdict == "exact"


def test_doctor_takes_a_model_with_few_positions(capsys, monkeypatch, tmp_path):
    build("gpt2", n_positions=8).save_pretrained(tmp_path)
    assert json.loads(doctor(capsys, monkeypatch, str(tmp_path), "--json"))["verdict"] == "exact"


def test_a_prompt_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="input_ids: expected"):
        diagnose(build("llama"), tokens(2, 5))


def test_the_random_prompt_avoids_tokens_with_a_meaning():
    model = architecture_models.build("gemma3_vision")
    config = model.config
    special = {config.image_token_index, config.boi_token_index, config.eoi_token_index}
    drawn = set(random_prompt(model, 2000)[0].tolist())
    assert len(drawn) > 40
    assert not drawn & special


def test_verdicts_follow_the_dtype():
    assert [verdict(r, torch.float32) for r in (0.0, 1e-3, 1.1e-3, 1e-1, 0.11, math.nan, None)] == (
        ["exact"] * 2 + ["approximate"] * 2 + ["wrong"] * 3
    )
    assert [verdict(r, torch.bfloat16) for r in (5e-2, 6e-2, 0.2)] == ["exact", "approximate", "wrong"]
    completeness = {"overall": 1e-2, "layers": {"0": 0.5}}
    assert (verdict_of(completeness, torch.float32), verdict_of(completeness, torch.float16)) == ("wrong", "exact")


def scored(out: str) -> set[str]:
    return {head["head"] for head in json.loads(out)["heads"]}


@pytest.mark.parametrize("norm", ["none", "frozen"])
def test_score_finds_the_planted_heads_and_keeps_the_residual(capsys, monkeypatch, planted, tmp_path, norm):
    _, model, _ = planted
    command = [*arguments(planted, norm=norm, top="3", out=str(tmp_path / "scores")), "--json"]
    code, out, err = run(capsys, monkeypatch, command)
    assert (code, "warning" in err) == (0, False)
    assert scored(out) == {f"{layer}-{head}" for layer, head in model.heads["literal"]}
    scores = HeadScores.from_pretrained(tmp_path / "scores")
    assert set(scores.found()) == set(model.heads["literal"])
    assert scores.meta["norm"] == norm
    assert scores.meta["completeness"]["overall"] < 1e-5
    assert [*scores.meta["completeness"]["layers"]] == ["0", "1", "2", "3"]


def test_an_unknown_norm_is_refused_before_anything_is_read(capsys, monkeypatch, planted):
    code, _, err = run(capsys, monkeypatch, arguments(planted, norm="melted", context="missing.txt"))
    assert (code, "norm: expected one of none, frozen" in err) == (2, True)


@pytest.fixture
def miss(monkeypatch):
    """Make the contributions miss: layer 1 writes a multiple of what its heads account for. Returns the setter."""

    def install(factor: float) -> None:
        def attribute_wrongly(*args: Any) -> Attribution:
            result = attribute_heads(*args)
            layer = result.layers[1]
            return result._replace(layers=result.layers | {1: layer._replace(write=factor * layer.write)})

        for module in (scoring, diagnosis):
            monkeypatch.setattr(module, "attribute_heads", attribute_wrongly)

    return install


def test_scores_that_are_not_logits_are_refused_unless_forced(
    capsys,
    monkeypatch,
    planted,
    tmp_path,
    miss,
):
    miss(3.0)
    command = arguments(planted, norm="frozen", out=str(tmp_path / "scores"))
    code, out, err = run(capsys, monkeypatch, command)
    assert (code, out) == (2, "")
    assert "completeness: contributions miss the model's logit" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "scores").exists()
    code, _, err = run(capsys, monkeypatch, [*command, "--force"])
    assert (code, "warning: contributions miss" in err) == (0, True)
    assert HeadScores.from_pretrained(tmp_path / "scores").meta["completeness"]["layers"]["1"] > 0.1


def test_a_small_error_is_a_warning(capsys, monkeypatch, planted, miss):
    miss(1.02)
    code, _, err = run(capsys, monkeypatch, arguments(planted, norm="frozen"))
    assert (code, "warning: contributions miss" in err) == (0, True)


def test_the_published_score_only_warns(capsys, monkeypatch, planted, miss):
    miss(3.0)
    code, out, err = run(capsys, monkeypatch, [*arguments(planted), "--json"])
    assert (code, "true logit units" in err) == (0, True)
    assert json.loads(out)["meta"]["completeness"]["layers"]["1"] > 0.1
