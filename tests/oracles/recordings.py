"""What the tests of recordings share: one question to all tiny models, and when two recordings agree.

Tolerances: a float64 model is compared with a float64 recomputation from its own queries, keys and values, where only
the order of the sums differs (EXACT). transformers' eager softmax works in float32 whatever the model's dtype, which
costs about 2^-24 per weight (SOFTMAX). Two float32 runs that should agree sum in a different order, which is worth a
few ulp of 2^-23 in each of the dozen matrix products up to the third layer (FLOAT32). All are relative to the largest
magnitude of what is compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from locos_fast.scoring.recording import Recording, record
from tests.oracles.cached_forward import forward_with_cache
from tests.oracles.tiny_models import tokens

EXACT = 1e-11
SOFTMAX = 1e-6
FLOAT32 = 64 * 2**-23

LENGTH = 21  # more than twice the window, and odd
ROWS = [7, 13, 20]
SPANS = [(2, 5), (4, 12), (15, 17)]  # two overlap; a window of 8 reaches the first only from row 7
SINKS = "gpt_oss"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude expected; infinities and integers must agree exactly."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].double(), expected[~finite].double())
    error = (actual[finite].double() - expected[finite].double()).abs()
    bound = 0.0 if not expected.is_floating_point() else tolerance * float(expected[finite].abs().max())
    assert float(error.max()) <= bound


def assert_same_recording(actual: Recording, expected: Recording, tolerance: float) -> None:
    assert list(actual) == list(expected)
    for layer in expected:
        for have, want in zip(actual[layer], expected[layer], strict=True):
            assert_close(have, want, tolerance)


class Batch(NamedTuple):
    """Sequences of different lengths in one batch, as a model takes them."""

    inputs: dict[str, Tensor]
    offsets: list[int]  # slots of padding on the left of each batch row
    lengths: list[int]


def make_batch(padding: str | None) -> Batch:
    lengths = [LENGTH, LENGTH] if padding is None else [LENGTH, LENGTH - 5]
    offsets = [LENGTH - length if padding == "left" else 0 for length in lengths]
    ids, mask = tokens(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.int64)
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        mask[row, offset : offset + length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if padding is None:
        return Batch({"input_ids": ids}, offsets, lengths)
    return Batch({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, offsets, lengths)


PADDINGS = [None, "left", "right"]


def run_in_chunks(model: PreTrainedModel, ids: Tensor, sizes: tuple[int, ...], cache: Any = None) -> list[Tensor]:
    cache = DynamicCache(config=model.config) if cache is None else cache
    return [forward_with_cache(model, chunk, cache=cache).logits for chunk in ids.split(sizes, dim=1)]


def recorded_at_once(model: PreTrainedModel, ids: Tensor) -> Recording:
    with record(model, ROWS, SPANS) as kept:
        model(ids, use_cache=False)
    return kept
