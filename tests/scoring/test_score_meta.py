"""What goes with the scores: how they came about, and whose they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import locos_fast
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.head_scores import ARRAYS
from locos_fast.scoring.score import score_tokens
from locos_fast.scoring.scorer import LocosScorer
from tests.oracles.score_cases import ANSWER, LENGTH, described
from tests.oracles.tiny_models import UNCOMPILED_FLEX, WINDOW, build, tokens

pytestmark = UNCOMPILED_FLEX


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_meta_says_how_the_scores_came_about(attention: str) -> None:
    model, ids = build("llama", attention, dtype=torch.bfloat16), tokens(1, LENGTH)
    meta = json.loads(json.dumps(score_tokens(model, ids, [(4, 6), (6, 9)], ANSWER).meta, allow_nan=False))
    assert meta["model"] == meta["model_class"] == "LlamaForCausalLM"
    assert meta["dtype"] == "bfloat16"
    assert meta["device"] == "cpu"
    assert meta["attn_implementation"] == attention
    assert meta["versions"].keys() == {"locos_fast", "torch", "transformers"}
    assert meta["versions"]["locos_fast"] == locos_fast.__version__
    assert meta["norm"] == "none"
    assert meta["needle_spans"] == [[4, 9]]
    assert meta["answer_positions"] == ANSWER
    assert meta["answer_ids"] == ids[0, ANSWER].tolist()
    assert meta["tokens"] == LENGTH


class Letters:
    """A tokenizer that can only speak."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(ord("A") + token) for token in token_ids)


def test_a_trial_is_scored_as_its_tokens() -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    trial = Trial(
        prompt_ids=ids[0, :25].tolist(),
        needle_span=(4, 9),
        answer_ids=ids[0, 25:].tolist(),
        question="?",
        needle="!",
        answer="",
        depth=20.0,
        length=25,
        id="one",
    )
    scores = LocosScorer(model, Letters()).score(trial)
    expected = score_tokens(model, ids, (4, 9), [25, 26])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(scores, name), getattr(expected, name))
    assert described(scores) == described(expected) | trial.describe() | {
        "answer_tokens": [chr(ord("A") + token) for token in ids[0, 25:].tolist()],
    }


def test_the_share_of_the_needle_that_a_window_shows_is_kept() -> None:
    """A row at slot r of a window of WINDOW sees slots r - WINDOW + 1 ... r; full layers see the whole needle."""
    model, ids = build("gemma3"), tokens(1, 24)
    row = 22
    first_seen = row - WINDOW + 1
    scores = score_tokens(model, ids, (first_seen - 3, first_seen + 1), [row + 1])
    assert scores.meta["needle_visible_share"] == {"0": 0.25, "1": 1.0, "2": 0.25}
    assert score_tokens(model, ids, (0, 4), [row + 1]).meta["needle_visible_share"] == {"0": 0.0, "1": 1.0, "2": 0.0}
