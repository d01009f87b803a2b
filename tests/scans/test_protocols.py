"""The two protocols: the answer is given to the model, or the model gives it itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from locos_fast.models.generation import StopRules, generate_greedily
from locos_fast.prompts.trials import Trial
from locos_fast.scans import attempt
from locos_fast.scans.attempt import Attempts, Method
from locos_fast.scans.run import scan
from locos_fast.scans.store import ScanFolder
from locos_fast.scoring.tuned_lens import TunedLens
from tests.oracles.architecture_models import build
from tests.oracles.scores import assert_same
from tests.oracles.tiny_models import VOCABULARY, tokens

FAMILIES = ("llama", "mistral", "gemma3", "gemma4")  # full attention, a window, both, and layers that share keys
REPLY = 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def trial_of(model, tokenizer, number: int, *, skip: int = 0) -> Trial:
    """A trial whose answer is what the model says by itself, from token `skip` of its reply on."""
    prompt = tokens(1, 60, seed=7)[0].tolist()[: 50 + 2 * number] + tokens(1, 12, seed=number)[0].tolist()
    stop = StopRules.of(model, tokenizer)
    reply = generate_greedily(model, prompt, stop=stop, max_new_tokens=REPLY).ids
    place = 30 + number
    return Trial(
        prompt_ids=prompt,
        needle_span=(place, place + 4),
        answer_ids=reply[skip:],
        question="q",
        needle="n",
        answer=tokenizer.decode(reply[skip:]),
        depth=50,
        length=len(prompt),
        id=str(number),
        question_span=(len(prompt) - 5, len(prompt) - 2),
        foil_ids=tokens(1, 3, seed=99)[0].tolist(),
    )


GENERATE = Method(protocol="generate", max_new_tokens=REPLY)


@pytest.mark.parametrize("family", FAMILIES)
def test_protocols_agree_where_the_model_gives_the_answer_itself(family: str, tokenizer, tmp_path: Path) -> None:
    model = build(family, dtype=torch.float32)
    trials = [trial_of(model, tokenizer, number) for number in range(4)]
    given = scan(model, tokenizer, trials, tmp_path / "teacher")
    own = scan(model, tokenizer, trials, tmp_path / "generate", method=GENERATE)
    assert given.statuses == own.statuses == {"scored": 4}
    assert {"qrhead", "locos_foil", "locos_frozen", "contrastive"} <= set(own.scores.names)
    assert_same(own.scores, given.scores)
    lines = ScanFolder(tmp_path / "generate").lines().values()
    assert {line["rouge_1_recall"] for line in lines} == {1.0}
    assert max(line["prefix_tokens"] for line in lines) > 16


def test_only_the_tokens_that_give_the_answer_are_scored(tokenizer, tmp_path: Path) -> None:
    """Those in front of it are the reply's others, without which the contrastive score has nothing to take away."""
    model = build("llama", dtype=torch.float32)
    whole = next(t for n in range(20) if len(set((t := trial_of(model, tokenizer, n)).answer_ids)) == REPLY)
    late = dataclasses.replace(
        whole, answer_ids=whole.answer_ids[2:], answer=tokenizer.decode(whole.answer_ids[2:]), foil_ids=None
    )
    found = Attempts(model, tokenizer, GENERATE).attempt([late], None)[0]
    assert found.line["answer_steps"] == [2, 3] and found.line["generated"] == whole.answer
    behind = dataclasses.replace(
        late, prompt_ids=[*whole.prompt_ids, *whole.answer_ids[:2]], length=len(whole.prompt_ids) + 2, lead_tokens=2
    )
    given = Attempts(model, tokenizer, Method()).attempt([behind], None)[0]
    for name in ("score", "dla", "qrhead", "contrastive"):
        np.testing.assert_allclose(found.arrays[name], given.arrays[name], rtol=0, atol=1e-5)


def test_a_reply_without_the_answer_does_not_count(tokenizer, tmp_path: Path) -> None:
    model = build("llama", dtype=torch.float32)
    right, other = trial_of(model, tokenizer, 0), trial_of(model, tokenizer, 1)
    missing = [i for i in range(1, VOCABULARY) if i not in generate(model, tokenizer, other)][:3]
    wrong = dataclasses.replace(other, answer_ids=missing, answer=tokenizer.decode(missing))
    found = scan(model, tokenizer, [right, wrong], tmp_path / "x", method=GENERATE)
    assert found.statuses == {"scored": 1, "gated": 1}
    with pytest.raises(ValueError, match=r"no trial counts \(1 gated\): for 'w.*' the model says 'w"):
        scan(model, tokenizer, [wrong], tmp_path / "y", method=GENERATE)
    with pytest.raises(ValueError, match=r"no trial counts \(1 gated\)"):  # no token of it could be scored
        scan(model, tokenizer, [wrong], tmp_path / "z", method=dataclasses.replace(GENERATE, gate=False))


def test_where_no_trial_counts_the_model_is_asked_what_it_says(tokenizer, tmp_path: Path) -> None:
    model = build("llama", dtype=torch.float32)
    wrong = dataclasses.replace(trial_of(model, tokenizer, 0), answer_ids=[3, 3, 3, 3], answer="w3 w3 w3 w3")
    says = tokenizer.decode(generate(model, tokenizer, wrong))
    with pytest.raises(ValueError, match=f"for 'w3 w3 w3 w3' the model says '{says}'"):
        scan(model, tokenizer, [wrong], tmp_path, method=Method(max_new_tokens=REPLY))


def generate(model, tokenizer, trial: Trial) -> list[int]:
    stop = StopRules.of(model, tokenizer)
    return generate_greedily(model, trial.prompt_ids, stop=stop, max_new_tokens=REPLY).ids


def test_generating_is_not_observed(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it costs what it costs without scoring: no hook and no other attention while the reply is made."""
    model = build("llama", dtype=torch.float32)
    real, hooks = attempt.generate_greedily, []

    def watched(model, *arguments, **options):
        hooks.append(sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()))
        return real(model, *arguments, **options)

    monkeypatch.setattr(attempt, "generate_greedily", watched)
    Attempts(model, tokenizer, GENERATE).attempt([trial_of(model, tokenizer, 0)], None)
    assert hooks == [0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"protocol": "ask"}, "protocol: expected teacher or generate, got 'ask'"),
        ({"norm": "x"}, "norm"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens: expected a whole number"),
        ({"norm": "frozen", "lens": TunedLens({0: (torch.eye(2), torch.zeros(2))})}, "tuned lens: it reads raw"),
    ],
)
def test_a_method_that_there_is_not_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**options)


def test_what_scores_depend_on_is_kept() -> None:
    assert Method().as_config() == {"protocol": "teacher", "gate": True, "norm": "none"}
    assert GENERATE.as_config()["max_new_tokens"] == REPLY


def test_every_line_says_whether_the_model_was_right(tokenizer, tmp_path: Path) -> None:
    model = build("llama", dtype=torch.float32)
    right = trial_of(model, tokenizer, 0)
    wrong = dataclasses.replace(trial_of(model, tokenizer, 1), answer_ids=[3, 3, 3, 3], answer="w3 w3 w3 w3")
    scan(model, tokenizer, [right, wrong], tmp_path, method=Method(gate=False))
    lines = ScanFolder(tmp_path).lines().values()
    assert {line["id"]: (line["status"], line["right"]) for line in lines} == {
        "0": ("scored", True),
        "1": ("scored", False),
    }


def test_prompts_that_cannot_share_a_beginning_are_said_to(tokenizer, tmp_path: Path, monkeypatch) -> None:
    model, said = build("llama", dtype=torch.float32), []
    trials = [trial_of(model, tokenizer, number) for number in range(2)]
    monkeypatch.setattr("locos_fast.scans.run.cannot_share", lambda _: "LlamaForCausalLM takes no cache")
    scan(model, tokenizer, trials, tmp_path, notice=said.append)
    assert said == ["LlamaForCausalLM takes no cache; each trial is run on its own"]


def test_the_prompt_is_computed_once_for_the_reply_and_its_scores(tokenizer) -> None:
    model = build("llama", dtype=torch.float32)
    trial, attempts = trial_of(model, tokenizer, 0), Attempts(model, tokenizer, GENERATE)
    attempts.attempt([trial], None)  # what is shown of a model once
    fed: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    attempts.attempt([trial], None)
    hook.remove()
    prompt = len(trial.prompt_ids)
    assert sum(fed) < prompt + 2 * (prompt - trial.question_span[0] + 8 + REPLY)
