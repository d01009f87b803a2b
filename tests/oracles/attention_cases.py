"""Hypothesis strategies: any problem the tensor functions accept, drawn as a few plain numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from locos_fast.ops import Visibility
from tests.oracles.attention_problem import (
    LAYOUTS,
    Problem,
    WeightsProblem,
    random_problem,
    random_weights_problem,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = (16, 24, 64, 80, 96, 128, 256)
MOST_SCORES = 40_000  # batch x heads x rows x keys: an example takes some tens of milliseconds


class Sizes(NamedTuple):
    seed: int
    batch: int
    kv_heads: int
    group: int
    rows: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    layout: str

    @property
    def shared(self) -> dict:
        """What both kinds of problem need."""
        names = ("batch", "kv_heads", "group", "rows", "keys", "value_dim", "dtype", "layout")
        return {name: getattr(self, name) for name in names}


class Case(NamedTuple):
    """An attention problem; `problem` makes its tensors."""

    sizes: Sizes
    placement: str  # where the answer rows are
    kv_offset: int
    window: int | None
    chunk: int | None
    padding: bool
    hole_share: float | None
    spans: list  # of pairs, or one list of pairs per batch row
    scale: float | None
    softcap: float | None
    sinks: bool

    def problem(self) -> Problem:
        torch.manual_seed(self.sizes.seed)
        return random_problem(
            **self.sizes.shared,
            head_dim=self.sizes.head_dim,
            spans=spans_argument(self.spans),
            visibility=self._visibility(),
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def _visibility(self) -> Visibility:
        batch, rows, keys = self.sizes.batch, self.sizes.rows, self.sizes.keys
        start, end = self.kv_offset, self.kv_offset + keys
        key_mask = None if self.hole_share is None else torch.rand(batch, keys) >= self.hole_share
        match self.placement:
            case "end":
                positions = torch.arange(end, end + rows) - rows
            case "anywhere":
                positions = torch.randint(max(0, start - 3), end + 3, (rows,))
            case "anywhere per batch row":
                positions = torch.randint(max(0, start - 3), end + 3, (batch, rows))
            case "any interval":
                first, last = torch.randint(0, end + 3, (2, batch, rows))
                return Visibility(first, last, self.kv_offset, key_mask)
        return Visibility.causal(
            positions.clamp_min(0),
            kv_offset=self.kv_offset,
            window=self.window,
            chunk=self.chunk,
            left_padding=torch.randint(0, end, (batch,)) if self.padding else None,
            key_mask=key_mask,
        )


class WeightsCase(NamedTuple):
    """A problem of `ov_contribution`."""

    sizes: Sizes
    spans: list
    hidden: float

    def problem(self) -> WeightsProblem:
        torch.manual_seed(self.sizes.seed)
        spans = spans_argument(self.spans)
        return random_weights_problem(**self.sizes.shared, spans=spans, hidden=self.hidden)


def spans_argument(spans: list) -> list | torch.Tensor:
    """Pairs stay pairs; one list of pairs per batch row becomes a (B, S, 2) tensor."""
    return torch.tensor(spans) if isinstance(spans[0], list) else spans


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    batch, kv_heads, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    group = draw(st.sampled_from([1, 3, 5, 7, 8]))
    most_keys = min(2000, MOST_SCORES // (batch * kv_heads * group * rows))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    return Sizes(
        draw(st.integers(0, 2**31 - 1)),
        batch,
        kv_heads,
        group,
        rows,
        draw(st.integers(1, most_keys)),
        head_dim,
        draw(st.just(head_dim) | st.sampled_from(HEAD_DIMS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
    )


def pairs(slots: int) -> st.SearchStrategy[tuple[int, int]]:
    """A span: anywhere, at either end, everything, or past the end."""
    anywhere = st.integers(0, slots + 9).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(start + 1, slots + 20))
    )
    return anywhere | st.sampled_from([(0, 1), (max(0, slots - 1), slots), (0, slots), (slots, slots + 3)])


@st.composite
def spans(draw: st.DrawFn, slots: int, batch: int) -> list:
    n_spans = draw(st.integers(1, 5))
    some = st.lists(pairs(slots), min_size=n_spans, max_size=n_spans)
    if draw(st.booleans()):
        return draw(some)
    return [draw(some) for _ in range(batch)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    drawn = draw(sizes())
    kv_offset = draw(st.sampled_from([0, 0, 1, 37, 100_000]))
    distances = st.none() | st.integers(1, drawn.keys + 2)
    return Case(
        drawn,
        draw(st.sampled_from(["end", "anywhere", "anywhere per batch row", "any interval"])),
        kv_offset,
        draw(distances),
        draw(distances),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, 0.1, 0.7, 1.0])),
        draw(spans(kv_offset + drawn.keys, drawn.batch)),
        draw(st.sampled_from([None, 2 * drawn.head_dim**-0.5])),
        draw(st.sampled_from([None, 1.5])),  # scores are about 1 or 2 wide: a cap of 1.5 bites
        draw(st.booleans()),
    )


@st.composite
def weights_cases(draw: st.DrawFn) -> WeightsCase:
    drawn = draw(sizes())
    return WeightsCase(drawn, draw(spans(drawn.keys, drawn.batch)), draw(st.sampled_from([0.0, 0.5, 1.0])))
