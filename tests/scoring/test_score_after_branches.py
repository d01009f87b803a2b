"""Scores behind a beginning are the same to the bit, whatever was continued from it before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from locos_fast import HeadScores, score_tokens
from locos_fast.models.answer_pass import continued_logits
from locos_fast.models.prefix_cache import PrefixCache
from tests.oracles.architecture_models import build
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import tokens

BEGINNING, LENGTH = 40, 60
PASSES = ((0, 25), (25, BEGINNING))


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def beginning(model, ids: torch.Tensor) -> PrefixCache:
    prefix = PrefixCache(model)
    for start, end in PASSES:
        prefix.extend(ids[:, start:end])
    return prefix


def scored(model, ids: torch.Tensor, prefix: PrefixCache) -> HeadScores:
    return score_tokens(model, ids, (20, 30), [LENGTH - 2, LENGTH - 1], prefix=prefix)


def assert_equal(found: HeadScores, expected: HeadScores) -> None:
    for name in expected.names:
        assert np.array_equal(found.array(name), expected.array(name), equal_nan=True), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "llama4", "deepseek_v3"])
def test_branches_rows_and_failures_change_no_bit(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    ids, other = tokens(1, LENGTH), tokens(1, LENGTH, seed=1)
    expected = scored(model, ids, beginning(model, ids))
    prefix = beginning(model, ids)
    assert_equal(scored(model, ids, prefix), expected)
    with prefix.branch():
        prefix.extend(other[:, :7])
        with prefix.branch():
            prefix.extend(other[:, :30])
    assert_equal(scored(model, ids, prefix), expected)
    rests = [other[:, :5], other[:, :12]]
    with torch.inference_mode():
        continued_logits(model, rests, [[4], [11]], prefix)
    assert_equal(scored(model, ids, prefix), expected)
    with pytest.raises(RuntimeError, match="stop"), prefix.branches(3):
        raise RuntimeError("stop")
    assert_equal(scored(model, ids, prefix), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_beginning_that_goes_on_from_a_cut_is_that_of_one_never_cut(family: str) -> None:
    model = build(family, dtype=torch.float32)
    ids, other = tokens(1, LENGTH), tokens(1, LENGTH, seed=1)
    prefix = PrefixCache(model)
    for start, end in PASSES:
        with prefix.branch():
            prefix.extend(other[:, : LENGTH - start])
        prefix.extend(ids[:, start:end])
    assert_equal(scored(model, ids, prefix), scored(model, ids, beginning(model, ids)))
