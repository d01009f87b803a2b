"""contrast="mean" takes the mean unembedding row away, without a copy of the unembedding in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_extra
from locos_fast.scoring.directions import BLOCK, Target, token_directions
from tests.oracles.tiny_models import build

IDS = torch.tensor([5, 0, 5])


def with_vocabulary(size: int, dtype: torch.dtype) -> nn.Module:
    model = build("llama", dtype=dtype)
    model.lm_head = nn.Linear(32, size, bias=False, dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, 5 * BLOCK + 7])
def test_the_mean_row_is_taken_away(size: int, dtype: torch.dtype) -> None:
    model = with_vocabulary(size, dtype)
    weight = model.lm_head.weight.detach().double()
    expected = weight[IDS] - weight.mean(0)
    actual = token_directions(model, Target(IDS, "mean"))
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    # float32: the sum of 2^12 numbers of one size, in whatever order, is worth fewer ulp than its depth
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=16 * 2.0**-24 * float(weight.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_more_than_a_block_is_held_in_float32(dtype: torch.dtype) -> None:
    model = with_vocabulary(40 * BLOCK, dtype)
    token_directions(model, Target(IDS, "mean"))
    peak = peak_extra(lambda: token_directions(model, Target(IDS, "mean")), "cpu")
    assert peak <= 2 * 4 * BLOCK * 32 < model.lm_head.weight.nbytes / 2  # a block, and the sums of all
