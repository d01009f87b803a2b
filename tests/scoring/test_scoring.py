"""Scores are what the definition says, and what the public implementation printed.

Tolerances are relative to the largest magnitude of an array. GOLDEN is the agreement that two float32 runs of the
recorded cases reach. Our own cases run in float64 against sums over positions, written out here; but transformers'
eager softmax and all norms work in float32 even then, and an error of 2^-24 grows tenfold on its way through three
layers (ROUNDING).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import locos_fast
from locos_fast.models.architecture import attention_layers
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.head_scores import ARRAYS, HeadScores
from locos_fast.scoring.score import score_tokens
from locos_fast.scoring.scorer import LocosScorer
from tests.oracles import architecture_models
from tests.oracles.tiny_models import FAMILIES, PAIRS, WINDOW, build, captured_values, one_thread, tokens, visible_keys

GOLDEN = 2e-5
ROUNDING = 2e-6
BACKENDS = ["torch", "reference"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers sets it
]


@pytest.fixture(scope="module", autouse=True)
def plain_torch() -> Iterator[None]:
    """flex_attention as ordinary tensor operations: the interface is the same, and compiling takes a minute."""
    with one_thread(), torch.compiler.set_stance("force_eager"):
        yield


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude expected, and NaN in the same places."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    bound = tolerance * np.nanmax(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


# --- the public implementation

GOLDEN_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
NAMES = {name: name for name in ARRAYS} | {"score": "locos"}


@pytest.mark.skipif(not GOLDEN_FOLDER.is_dir(), reason="the recorded scores lie outside the repository")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama_gqa", "mistral_mqa", "qwen3_wide_heads"])
def test_scores_are_those_of_the_public_implementation(name: str, attention: str, backend: str) -> None:
    folder = GOLDEN_FOLDER / name
    trial = json.loads((folder / "trial.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    prompt = trial["prompt_ids"]
    scores = score_tokens(
        model,
        torch.tensor([prompt + trial["generated_ids"]]),
        tuple(trial["needle_span"]),
        [len(prompt) + step for step in trial["answer_steps"]],
        backend=backend,
        verify=True,
    )
    for ours, theirs in NAMES.items():
        assert_close(getattr(scores, ours), expected[theirs], GOLDEN)


# --- the definition

LENGTH = 27  # more than three windows of 8
ANSWER = [22, 24, 25]
NEEDLES = {
    "in a window": [(17, 20)],
    "across the edge of a window": [(10, 20)],
    "beyond every window": [(3, 6)],
    "in several places": [(4, 6), (14, 19)],
}


@torch.no_grad()
def naive_scores(
    model: PreTrainedModel, input_ids: Tensor, spans: list[tuple[int, int]], answer: list[int]
) -> dict[str, np.ndarray]:
    """All detectors from eager attention weights and value states, position by position."""
    length = max(answer)
    with captured_values(model) as values:
        attentions = model(input_ids[:, :length], output_attentions=True, use_cache=False).attentions
    needle = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        needle[start:end] = True
    heads, layers = attentions[0].shape[1], len(attentions)
    result = {name: np.full((layers, heads), np.nan) for name in ARRAYS}
    for layer, projection in ((layer.number, layer.projection) for layer in attention_layers(model)):
        value = values[layer][0].repeat_interleave(heads // values[layer].shape[1], 0)  # (H, N, Dv)
        weight = projection.weight if hasattr(projection, "in_features") else projection.weight.T  # Linear or Conv1D
        per_row: dict[str, list[Tensor]] = {name: [] for name in ARRAYS}
        for position in answer:
            token = input_ids[0, position]
            w = (model.lm_head.weight[token] @ weight).view(heads, -1)
            alpha = attentions[layer][0, :, position - 1]  # (H, N)
            phi = alpha * torch.einsum("hd,hnd->hn", w, value)
            seen = visible_keys(model, layer, length)[position - 1]
            assert torch.equal(alpha[0] > 0, seen)
            largest = alpha.argmax(-1)
            copied = needle[largest] & (input_ids[0, largest] == token)
            per_row["dla"].append(phi.sum(-1))
            per_row["wu"].append(copied / int(needle.sum()))
            n, others = int((needle & seen).sum()), int((~needle & seen).sum())
            if n == 0:
                continue
            scale = n / others if others else 0.0
            per_row["l_plus"].append(phi[:, needle].sum(-1))
            per_row["l_minus"].append(scale * phi[:, ~needle].sum(-1))
            per_row["attention_spatial"].append(alpha[:, needle].sum(-1) - scale * alpha[:, ~needle].sum(-1))
        for name, rows in per_row.items():
            if rows:
                together = torch.stack(rows)
                result[name][layer] = (together.sum(0) if name == "wu" else together.mean(0)).numpy()
        result["score"][layer] = result["l_plus"][layer] - result["l_minus"][layer]
    return result


def with_a_copied_answer(model: PreTrainedModel, input_ids: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The last answer token becomes the token in the needle that some head attends to most: its copy score is not 0.

    The row that predicts a token does not see it, so nothing else changes.
    """
    row = max(ANSWER) - 1
    with torch.no_grad():
        attentions = model(input_ids[:, : row + 1], output_attentions=True, use_cache=False).attentions
    inside = torch.zeros(row + 1, dtype=torch.bool)
    for start, end in spans:
        inside[start:end] = True
    slots = torch.cat([weights[0, :, row].argmax(-1) for weights in attentions])
    slots = slots[inside[slots]]
    if len(slots):
        input_ids = input_ids.clone()
        input_ids[0, max(ANSWER)] = input_ids[0, slots[0]]
    return input_ids


@pytest.mark.parametrize("needle", NEEDLES)
@pytest.mark.parametrize("family, attention", PAIRS)
def test_scores_are_the_definition(family: str, attention: str, needle: str) -> None:
    spans = NEEDLES[needle]
    truth = build(family, "eager", dtype=torch.float64)
    ids = with_a_copied_answer(truth, tokens(1, LENGTH), spans)
    expected = naive_scores(truth, ids, spans, ANSWER)
    if needle == "across the edge of a window":
        assert np.nanmax(expected["wu"]) > 0
    model = build(family, attention, dtype=torch.float64)
    for backend in BACKENDS:
        scores = score_tokens(model, ids, spans, ANSWER, backend=backend, verify=True)
        for name in ARRAYS:
            assert_close(getattr(scores, name), expected[name], ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_scores_are_those_of_float64(family: str) -> None:
    """Three layers of float32 products lose more than the sums that make a score."""
    scores = [
        score_tokens(build(family, dtype=dtype), tokens(1, LENGTH), NEEDLES["in several places"], ANSWER)
        for dtype in (torch.float32, torch.float64)
    ]
    for name in ARRAYS:
        assert_close(getattr(scores[0], name), getattr(scores[1], name), GOLDEN)


# --- windows


@pytest.mark.parametrize(
    "family, blind", [("mistral", [0, 1, 2]), ("gemma2", [0, 2]), ("gemma3", [0, 2]), ("gpt_oss", [0, 2])]
)
def test_layers_whose_window_never_reaches_the_needle_are_left_out(family: str, blind: list[int]) -> None:
    scores = score_tokens(build(family), tokens(1, LENGTH), (3, 6), ANSWER)
    for name in ARRAYS:
        values = getattr(scores, name)
        hidden = blind if name in ("score", "l_plus", "l_minus", "attention_spatial") else []
        assert np.isnan(values).all(-1).nonzero()[0].tolist() == hidden
        assert np.isnan(values).sum() == 4 * len(hidden)
    ranked = scores.top(100)
    assert len(ranked) == 4 * (3 - len(blind))
    assert not {layer for layer, _ in ranked + scores.found(0.0)} & set(blind)


def test_scores_are_means_over_the_rows_that_see_the_needle() -> None:
    """Row 12 sees slots 5..12, row 20 sees 13..20: only the first counts for the needle, both for DLA."""
    model, ids = build("mistral"), tokens(1, LENGTH)
    both, first, second = (score_tokens(model, ids, (4, 8), answer) for answer in ([13, 21], [13], [21]))
    for name in ("score", "l_plus", "l_minus", "attention_spatial"):
        np.testing.assert_allclose(getattr(both, name), getattr(first, name), rtol=1e-4)  # float32, shorter forward
        assert np.isnan(getattr(second, name)).all()
    np.testing.assert_allclose(both.dla, (first.dla + second.dla) / 2, rtol=1e-4, atol=1e-6)


def test_a_needle_that_is_all_a_row_sees_has_nothing_to_be_compared_with() -> None:
    scores = score_tokens(build("llama"), tokens(1, LENGTH), (0, 22), [22])
    assert (scores.l_minus == 0).all()
    np.testing.assert_array_equal(scores.score, scores.l_plus)
    assert_close(scores.l_plus, scores.dla, ROUNDING)


# --- the needle and the answer


def described(scores: HeadScores) -> dict:
    """`meta` without what differs from run to run."""
    return {name: value for name, value in scores.meta.items() if name != "cost"}


@pytest.mark.parametrize("spans", [[(4, 6), (6, 9)], [(5, 9), (4, 7)], [(4, 9), (5, 6)], [(8, 9), (4, 8)]])
def test_spans_that_touch_or_overlap_are_their_union(spans: list[tuple[int, int]]) -> None:
    model, ids = build("llama"), tokens(1, LENGTH)
    scores, union = score_tokens(model, ids, spans, ANSWER), score_tokens(model, ids, (4, 9), ANSWER)
    assert described(scores) == described(union)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(scores, name), getattr(union, name))


def test_the_order_of_the_answer_positions_does_not_matter() -> None:
    model, ids = build("llama", dtype=torch.float64), tokens(1, LENGTH)
    scores, turned = (score_tokens(model, ids, (4, 9), answer) for answer in (ANSWER, ANSWER[::-1]))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(turned, name), getattr(scores, name))
    assert described(turned) == described(scores)  # positions are kept in increasing order


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_after_the_last_answer_row_do_not_matter(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    more = torch.cat([ids[:, : max(ANSWER) + 1], tokens(1, 9, seed=1)], dim=1)
    scores, longer = score_tokens(model, ids, (4, 9), ANSWER), score_tokens(model, more, (4, 9), ANSWER)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(longer, name), getattr(scores, name))


# --- one lean forward pass


def test_logits_are_computed_for_the_answer_rows_only() -> None:
    model, shapes = build("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    scores = score_tokens(model, tokens(1, LENGTH), (4, 9), ANSWER)
    assert shapes == [(1, len(ANSWER), 32)]
    with torch.no_grad():
        logits = model(tokens(1, LENGTH)).logits[0]
    assert scores.meta["predicted_ids"] == [int(logits[position - 1].argmax()) for position in ANSWER]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_cache_is_made(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = build(family)

    def refuse(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a key-value cache was made")

    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    with pytest.raises(AssertionError, match="cache was made"), torch.no_grad():
        model(tokens(1, LENGTH))
    score_tokens(model, tokens(1, LENGTH), (4, 9), ANSWER)


def test_the_model_keeps_no_gradients() -> None:
    model = build("llama")
    score_tokens(model, tokens(1, LENGTH), (4, 9), ANSWER)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- arguments

GOOD = {"input_ids": tokens(1, LENGTH), "needle_span": (4, 9), "answer_positions": ANSWER}
BAD = [
    ("input_ids", tokens(LENGTH)),
    ("input_ids", tokens(2, LENGTH)),
    ("input_ids", tokens(1, LENGTH).int()),
    ("input_ids", tokens(1, LENGTH).float()),
    ("needle_span", (-1, 3)),
    ("needle_span", (9, 4)),
    ("needle_span", (4, 4)),
    ("needle_span", (20, LENGTH + 1)),  # beyond the tokens
    ("needle_span", (20, 23)),  # covers the first answer token
    ("needle_span", [(4, 9), (23, 26)]),
    ("needle_span", (26, 27)),  # after the answer, where no row sees it
    ("needle_span", []),
    ("needle_span", 4),
    ("needle_span", None),
    ("needle_span", (4, 9, 11)),
    ("needle_span", (4.0, 9.0)),
    ("answer_positions", []),
    ("answer_positions", [0]),
    ("answer_positions", [LENGTH]),
    ("answer_positions", [-1]),
    ("answer_positions", [22, 22]),
    ("answer_positions", [22.5]),
    ("norm", "final"),
    ("backend", "cuda"),
]


@pytest.mark.parametrize("argument, value", BAD)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        score_tokens(model, **{**GOOD, argument: value})


# --- what goes with the scores


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


def test_numpy_positions_are_as_good_as_ints() -> None:
    scores = score_tokens(build("llama"), tokens(1, LENGTH), (np.int64(4), np.int64(9)), np.array(ANSWER))
    json.dumps(scores.meta)


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
    assert described(scores) == described(expected) | {
        "trial": "one",
        "answer_tokens": [chr(ord("A") + token) for token in ids[0, 25:].tolist()],
    }


def test_the_order_does_not_matter_when_every_fed_token_is_an_answer_row():
    """Three tokens are fed and all three rows are answer rows: nothing but their order could tell them apart."""
    model, ids = build("llama"), tokens(1, 6)
    forward = score_tokens(model, ids, (0, 1), [1, 2, 3], contrast=[7, 8, 9])
    backward = score_tokens(model, ids, (0, 1), [3, 2, 1], contrast=[9, 8, 7])
    assert np.array_equal(forward.score, backward.score, equal_nan=True)
    assert np.array_equal(forward.dla, backward.dla)


@pytest.mark.parametrize("family", ["llama", "gemma4"])  # Gemma-4 then skips early queries in its shared-KV layers
def test_a_model_spread_over_devices_is_asked_for_its_last_logits(family: str) -> None:
    """An index tensor would have to be on the last layer's device; the number of last tokens works everywhere."""
    model, ids = architecture_models.build(family), tokens(1, 20)
    expected = score_tokens(model, ids, (2, 5), [12, 15, 19], norm="frozen")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    spread = score_tokens(model, ids, (2, 5), [12, 15, 19], norm="frozen")
    for name in ARRAYS:
        # float32: the same sums from products of other shapes
        assert_close(getattr(spread, name), getattr(expected, name), 1e-5)


def test_the_share_of_the_needle_that_a_window_shows_is_kept() -> None:
    """A row at slot r of a window of WINDOW sees slots r - WINDOW + 1 ... r; full layers see the whole needle."""
    model, ids = build("gemma3"), tokens(1, 24)
    row = 22
    first_seen = row - WINDOW + 1
    scores = score_tokens(model, ids, (first_seen - 3, first_seen + 1), [row + 1])
    assert scores.meta["needle_visible_share"] == {"0": 0.25, "1": 1.0, "2": 0.25}
    assert score_tokens(model, ids, (0, 4), [row + 1]).meta["needle_visible_share"] == {"0": 0.0, "1": 1.0, "2": 0.0}
