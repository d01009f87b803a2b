"""Scores are what the definition says, and what the public implementation printed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from locos_fast.models.architecture import attention_layers
from locos_fast.scoring.head_scores import ARRAYS
from locos_fast.scoring.prompt_parts import PromptParts
from locos_fast.scoring.score import score_tokens
from tests.oracles.score_cases import ANSWER, GOLDEN, LENGTH, ROUNDING, assert_close
from tests.oracles.tiny_models import FAMILIES, PAIRS, UNCOMPILED_FLEX, build, captured_values, tokens, visible_keys

BACKENDS = ["torch", "reference"]

pytestmark = UNCOMPILED_FLEX

# --- the public implementation

GOLDEN_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
NAMES = {name: name for name in ARRAYS} | {"score": "locos", "headkv": "headkv"}


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
        parts=PromptParts(prompt_tokens=len(prompt)),
    )
    for ours, theirs in NAMES.items():
        assert_close(scores.array(ours), expected[theirs], GOLDEN)


# --- the definition


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
    assert not {layer for layer, _ in ranked + scores.found(1e-9)} & set(blind)


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
