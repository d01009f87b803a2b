"""Scores behind a shared beginning are those of the whole prompt."""

import pytest
import torch

from locos_fast import score_tokens
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.scoring.directions import NORMS
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.scores import assert_same
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import WINDOW, tokens

LENGTH = 3 * WINDOW + 4
ANSWER = [LENGTH - 3, LENGTH - 2, LENGTH - 1]
NEEDLE = (LENGTH - 6 - WINDOW // 2, LENGTH - 6)  # partly inside windows
SHARED = [1, NEEDLE[0], NEEDLE[0] + 2, ANSWER[0] - 1]  # before, inside and behind the needle; all but the answer rows


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3_vision"])
def test_scores_equal_those_of_the_whole_prompt(family: str, norm: str) -> None:
    model, ids = build(family, "eager", dtype=torch.float32), tokens(1, LENGTH)
    expected = score_tokens(model, ids, NEEDLE, ANSWER, norm=norm)
    prefix = PrefixCache(model)
    for end in SHARED:
        prefix.extend(ids[:, prefix.tokens : end])
        found = score_tokens(model, ids, NEEDLE, ANSWER, norm=norm, prefix=prefix, verify=True)
        assert found.meta["prefix_tokens"] == end
        assert found.meta["predicted_ids"] == expected.meta["predicted_ids"]
        assert_same(found, expected)


def test_a_prefix_of_another_prompt_is_refused() -> None:
    model, ids = build("llama", dtype=torch.float32), tokens(1, LENGTH)
    prefix = PrefixCache(model)
    prefix.extend(ids[:, 1:5])
    with pytest.raises(ValueError, match="prefix: expected the first 4 tokens of input_ids, got others"):
        score_tokens(model, ids, NEEDLE, ANSWER, prefix=prefix)


def test_a_prefix_that_holds_an_answer_row_is_refused() -> None:
    model, ids = build("llama", dtype=torch.float32), tokens(1, LENGTH)
    prefix = PrefixCache(model)
    prefix.extend(ids[:, : ANSWER[0]])
    with pytest.raises(ValueError, match="prefix: expected fewer tokens than the first answer row"):
        score_tokens(model, ids, NEEDLE, ANSWER, prefix=prefix)
