"""Before a model is timed, a small cut of its geometry gives the same numbers by every path.

Largest difference over largest entry, at most 1e-4: both start from the same queries, keys and values, and both sum in
float32, whatever the model's dtype; rounding is near 1e-6.

Two runs of one forward pass are the same to the bit, so fused sums and reference sums start from the same numbers.
Running in chunks changes the matrix products of the forward pass itself, and is compared in float32 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.model_cases import ModelCase
from benchmarks.models import Shape, build, tokens
from locos_fast import attribute_tokens, score_tokens

TOLERANCE = 1e-4
LAYERS, VOCABULARY, TOKENS, CHUNK = 2, 4096, 777, 100
ARRAYS = ("score", "l_plus", "l_minus", "dla", "attention_spatial")


class Agreement(NamedTuple):
    """How far two ways to the same arrays are apart, relative to the largest entry."""

    what: str
    worst: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.what}: {self.worst:.2g} of the largest entry, at most {self.allowed:.2g}"


def check(shape: Shape, device: str) -> Iterator[Agreement]:
    """Every path on a cut of `shape`, in float32 and in its own dtype."""
    for dtype in dict.fromkeys((torch.float32, shape.dtype)):
        cut = shape._replace(layers=LAYERS, vocabulary=VOCABULARY, dtype=dtype)
        yield from _check_cut(ModelCase(cut, TOKENS, CHUNK), device)


def _check_cut(case: ModelCase, device: str) -> Iterator[Agreement]:
    model, ids = build(case.shape, device), tokens(case.shape, case.n_tokens, device)
    dtype, asked = case.shape.dtype, (model, ids, case.needle, case.answer_positions)
    where = str(dtype).removeprefix("torch.")
    for norm in ("none", "frozen"):
        fused = score_tokens(*asked, norm=norm, token_chunk=None)
        pairs = [("reference", score_tokens(*asked, norm=norm, token_chunk=None, backend="reference"))]
        if dtype == torch.float32:
            pairs.append(("token_chunk", score_tokens(*asked, norm=norm, token_chunk=case.token_chunk)))
        for name, other in pairs:
            worst = max(distance(getattr(fused, array), getattr(other, array)) for array in ARRAYS)
            yield Agreement(f"score_tokens, norm={norm!r}, {name}, {where}", worst, TOLERANCE)
    asked = (model, ids, case.answer_positions, case.segments)
    fused, naive = (attribute_tokens(*asked, token_chunk=None, backend=backend) for backend in ("auto", "reference"))
    yield Agreement(f"attribute_tokens, reference, {where}", distance(fused, naive), TOLERANCE)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest entry of `b`; NaN where one has NaN and the other not."""
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("nan")
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b)))
