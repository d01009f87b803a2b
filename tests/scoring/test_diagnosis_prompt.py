"""The prompt that a model is examined with fits the model, however small."""

from __future__ import annotations

import pytest

from locos_fast.scoring.diagnosis import PROMPT_TOKENS, diagnose, random_prompt
from locos_fast.scoring.score import score_tokens
from tests.oracles.tiny_models import build, tokens


@pytest.mark.parametrize("positions", [1, 2, 7, 31])
def test_a_model_with_few_positions_is_diagnosed_on_a_shorter_prompt(positions: int) -> None:
    model = build("gpt2", n_positions=positions)
    assert random_prompt(model).shape == (1, positions)
    assert diagnose(model).verdict == "exact"


@pytest.mark.parametrize("vocabulary", [1, 2, 5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_with_a_small_vocabulary_is_diagnosed(family: str, vocabulary: int) -> None:
    model = build(family, vocab_size=vocabulary)
    ids = random_prompt(model)
    assert ids.shape == (1, PROMPT_TOKENS)
    assert int(ids.max()) < vocabulary
    assert diagnose(model).verdict == "exact"


def test_a_short_prompt_is_scored_on_a_model_with_few_positions() -> None:
    model = build("gpt2", n_positions=12)
    scores = score_tokens(model, tokens(1, 12), (2, 5), [9, 11], norm="frozen")
    assert scores.meta["completeness"]["overall"] < 1e-5
