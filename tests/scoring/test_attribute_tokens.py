"""attribute_tokens: what every head wrote toward the answer from every segment of the context."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from locos_fast import attribute_tokens, score_tokens
from locos_fast.models.architecture import attention_layers
from locos_fast.models.attention_registry import RecordingError
from locos_fast.scoring import attribute_tokens as segment_attribution
from tests.oracles.architecture_models import FAMILIES
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import WINDOW, build, construct, tokens

LENGTH, ANSWER = 27, [25, 26]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest value; float64 models round sinks to float32


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def partition(size: int, tokens_in_all: int = LENGTH) -> list[tuple[int, int]]:
    return [(start, min(start + size, tokens_in_all)) for start in range(0, tokens_in_all, size)]


def assert_close(result: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """NaN in the same places, the rest within a share of the largest value."""
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    assert np.nanmax(np.abs(result - expected)) <= tolerance * np.nanmax(np.abs(expected))


def family_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return construct(FAMILIES[family], FAMILIES[family].implementations[0], dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_segments_of_a_partition_sum_to_the_dla(family: str) -> None:
    """Windows, chunks, sinks, softcaps, gates, latent attention, shared keys; linear layers are NaN in both."""
    model, ids = family_model(family), tokens(1, LENGTH)
    scores = score_tokens(model, ids, (20, 24), ANSWER)
    for size in (1, 4, LENGTH):
        sums = attribute_tokens(model, ids, ANSWER, partition(size)).sum(-1)
        assert_close(sums, scores.dla, 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_needle_as_a_segment_is_its_l_plus(family: str) -> None:
    """Every answer row sees this needle, in full layers and inside every window."""
    model, ids = family_model(family), tokens(1, LENGTH)
    scores = score_tokens(model, ids, (20, 24), ANSWER)
    result = attribute_tokens(model, ids, ANSWER, [(0, 5), (20, 24)])
    assert result.dtype == np.float32
    seeing = ~np.isnan(scores.l_plus)  # a chunk may begin behind the needle
    assert seeing.any()
    assert_close(np.where(seeing, result[..., 1], np.nan), scores.l_plus, TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_autocast_rounds_the_forward_pass_but_not_the_sums(family: str) -> None:
    """L+ and the attribution are summed from the same rounded keys and values, in two different ways."""
    model, ids = family_model(family), tokens(1, LENGTH)
    plain = score_tokens(model, ids, (20, 24), ANSWER).l_plus
    with torch.autocast("cpu", dtype=torch.bfloat16):
        l_plus = score_tokens(model, ids, (20, 24), ANSWER).l_plus
        result = attribute_tokens(model, ids, ANSWER, [(20, 24)])[..., 0]
    assert_close(result, l_plus, TOLERANCE[torch.float32])
    assert np.nanmax(np.abs(l_plus - plain)) > 1e-3 * np.nanmax(np.abs(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_needle_that_some_rows_see_counts_with_their_share(family: str, dtype: torch.dtype) -> None:
    """L+ is a mean over the rows that see the needle, an attribution over all answer rows."""
    model, ids = build(family, dtype=dtype), tokens(1, LENGTH)
    needle = (24 - WINDOW, 25 - WINDOW + 1)  # row 24 sees the second of the two tokens, row 25 none, in a window
    first, second = (attribute_tokens(model, ids, [answer], [needle])[..., 0] for answer in ANSWER)
    both = attribute_tokens(model, ids, ANSWER, [needle])[..., 0]
    assert both.dtype == np.dtype(str(dtype).removeprefix("torch."))
    assert_close(both, (first + second) / 2, TOLERANCE[dtype])
    scores = score_tokens(model, ids, needle, ANSWER)
    share = np.array([0.5 if layer_is_sliding(model, layer) else 1.0 for layer in range(3)])[:, None]
    assert_close(both, scores.l_plus * share, TOLERANCE[dtype])


def layer_is_sliding(model: nn.Module, layer: int) -> bool:
    types = getattr(model.config, "layer_types", None) or []
    return bool(types) and types[layer] == "sliding_attention"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_segments_may_overlap_leave_gaps_and_come_in_any_order(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    segments = [(20, 24), (3, 9), (5, 27), (3, 9)]
    together = attribute_tokens(model, ids, ANSWER, segments)
    alone = [attribute_tokens(model, ids, ANSWER, [segment])[..., 0] for segment in segments]
    assert together.shape == (3, 4, 4)
    assert_close(together, np.stack(alone, axis=-1), TOLERANCE[torch.float32])


def test_a_segment_behind_the_last_answer_row_is_zero() -> None:
    """No row sees the last answer token."""
    model, ids = build("llama"), tokens(1, LENGTH)
    assert not attribute_tokens(model, ids, ANSWER, [(26, 27)]).any()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_backends_agree(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    ours, truth = (attribute_tokens(model, ids, ANSWER, partition(3), backend=b) for b in ("torch", "reference"))
    assert_close(ours, truth, TOLERANCE[torch.float32])


def test_the_order_of_the_answer_positions_does_not_matter() -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    turned, straight = (attribute_tokens(model, ids, answer, partition(5)) for answer in (ANSWER[::-1], ANSWER))
    np.testing.assert_array_equal(turned, straight)


class Adapted(nn.Linear):
    """A Linear by name only: its forward is not its weight, and it must be pushed through with basis vectors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 3 * nn.functional.linear(x, self.weight)


def test_a_projection_that_is_read_with_basis_vectors_is_not_taken_for_a_layer() -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    for layer in attention_layers(model):
        layer.projection.__class__ = Adapted
    scores = score_tokens(model, ids, (20, 24), ANSWER)
    result = attribute_tokens(model, ids, ANSWER, [(20, 24), *partition(LENGTH)])
    assert_close(result[..., 0], scores.l_plus, TOLERANCE[torch.float32])
    assert_close(result[..., 1], scores.dla, TOLERANCE[torch.float32])


def test_the_model_is_left_as_it_was() -> None:
    model, ids = build("gemma3"), tokens(1, LENGTH)
    with torch.no_grad():
        before = model(ids).logits
        attribute_tokens(model, ids, ANSWER, partition(4))
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


class Unhooked(nn.Linear):
    """Runs past its hooks."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_whose_output_projection_is_not_seen_is_an_error(layer: int) -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    attention_layers(model)[layer].projection.__class__ = Unhooked
    with pytest.raises(RecordingError, match=rf"layer {layer} .LlamaAttention. did not hand the outputs of its heads"):
        attribute_tokens(model, ids, ANSWER, partition(4))


def test_chunks_of_tokens_change_nothing_beyond_rounding() -> None:
    model, ids = build("gemma3"), tokens(1, LENGTH)
    whole, chunked = (attribute_tokens(model, ids, ANSWER, partition(4), token_chunk=size) for size in (None, 5))
    assert_close(chunked, whole, 1e-5)


@pytest.mark.parametrize(
    "segments, message",
    [
        ([], "segments: expected at least one"),
        ([(4, 4)], "segments: expected 0 <= start < end, got .4, 4."),
        ([(-1, 4)], "segments: expected 0 <= start < end"),
        ([(0, 5), (20, LENGTH + 1)], "segments: expected spans inside the 27 tokens, got .20, 28."),
        ([(0, 5, 6)], "segments: expected pairs of ints"),
        (["ab"], "segments: expected pairs of ints"),
    ],
)
def test_segments_that_fit_nothing_are_refused(segments: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_tokens(build("llama"), tokens(1, LENGTH), ANSWER, segments)


@pytest.mark.parametrize("answer", [[], [0], [LENGTH], [25, 25]])
def test_answer_positions_that_fit_nothing_are_refused(answer: list[int]) -> None:
    with pytest.raises(ValueError, match="answer_positions: expected"):
        attribute_tokens(build("llama"), tokens(1, LENGTH), answer, partition(4))


def test_a_layer_takes_one_call_whatever_the_number_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    calls = []
    contribution = segment_attribution.RowsCall.contribution

    def count(self: segment_attribution.RowsCall, direction: Tensor, spans: Tensor) -> object:
        calls.append((self.layer.number, spans.shape[1]))
        return contribution(self, direction, spans)

    monkeypatch.setattr(segment_attribution.RowsCall, "contribution", count)
    attribute_tokens(model, ids, ANSWER, partition(1))
    assert calls == [(0, LENGTH), (1, LENGTH), (2, LENGTH)]
