"""The planted model's trials are what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locos_fast import planted
from locos_fast.planted.model import KINDS
from locos_fast.planted.trials import planted_trials
from locos_fast.planted.vocabulary import CITIES, NAMES, TOKENS, build_tokenizer
from locos_fast.scans.manifest import Manifest


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(8, 700),
    kind=st.sampled_from(KINDS),
    depth=st.floats(0, 100),
    seed=st.integers(0, 2**32),
)
def test_trial_is_what_it_says(length: int, kind: str, depth: float, seed: int) -> None:
    trial = planted.trial(length, kind, depth=depth, seed=seed)
    words = [TOKENS[token] for token in trial.prompt_ids]
    start, end = trial.needle_span
    assert len(words) == trial.length == length
    assert words[0] == "[BOS]"
    assert " ".join(words[start:end]) == trial.needle
    assert " ".join(words[-3:]) == trial.question
    assert [TOKENS[token] for token in trial.answer_ids] == [trial.answer]
    assert words.count(trial.answer) == (1 if kind == "literal" else 0)
    assert trial.answer in (NAMES if kind == "literal" else CITIES)
    assert abs(start - 1 - depth / 100 * (length - 8)) <= 12  # at most one sentence from where it should be
    assert trial == planted.trial(length, kind, depth=depth, seed=seed)


def test_trial_tells_where_the_answer_lies() -> None:
    trial = planted.trial(50, "literal", depth=0, seed=0)
    assert trial.input_ids.shape == (1, 51)
    assert trial.input_ids.dtype == torch.int64
    assert trial.input_ids[0, trial.answer_positions].tolist() == trial.answer_ids


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("length", {"length": 7, "kind": "literal", "depth": 50, "seed": 0}),
        ("kind", {"length": 64, "kind": "figurative", "depth": 50, "seed": 0}),
        ("depth", {"length": 64, "kind": "literal", "depth": 101, "seed": 0}),
        ("depth", {"length": 64, "kind": "literal", "depth": float("nan"), "seed": 0}),
    ],
)
def test_trial_names_the_argument_that_is_wrong(argument: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        planted.trial(**arguments)


def test_equal_trials_of_a_tiny_prompt_are_asked_once_and_it_is_said() -> None:
    found = planted_trials(build_tokenizer(max_length=100), "literal", lengths=[8], depths=5, limit=1000)
    asked = {tuple(trial.prompt_ids) for trial in found.trials}
    assert len(asked) == len(found.trials) <= len(NAMES) * len(CITIES)
    assert found.notes[0].startswith(f"{1000 - len(asked)} of 1000 trials are left out")
    Manifest.of(found.config, found.trials)


def test_a_limit_that_reaches_no_trial_of_a_length_says_so() -> None:
    found = planted_trials(build_tokenizer(max_length=100), "literal", lengths=[60, 70, 80], depths=1, limit=2)
    assert len(found.notes) == 1 and found.notes[0].startswith("lengths without a trial: ")
