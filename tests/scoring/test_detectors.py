"""Further detectors are their definitions, summed position by position, and cost the published ones nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError, attention_layers
from locos_fast.scoring import targets as targets_module
from locos_fast.scoring.detectors import DETECTORS, detectors_for, in_order
from locos_fast.scoring.head_scores import ARRAYS, HeadScores
from locos_fast.scoring.prompt_parts import PromptParts, Rows
from locos_fast.scoring.score import score_tokens
from tests.oracles.score_cases import ANSWER, LENGTH, ROUNDING, assert_close
from tests.oracles.tiny_models import UNCOMPILED_FLEX, build, captured_values, tokens, visible_keys

pytestmark = UNCOMPILED_FLEX

FAMILIES = ("llama", "mistral", "gemma3", "gpt_oss")
NEEDLES = {"in a window": [(17, 20)], "across the edge": [(8, 16)], "beyond": [(3, 6)], "two": [(4, 6), (14, 19)]}
FOIL = [5, 9]  # shorter than the answer
PARTS = PromptParts(prompt_tokens=21, question=(11, 15), lead_tokens=2, foil_ids=FOIL)
REPLY = [p for p in range(PARTS.prompt_tokens - PARTS.lead_tokens, max(ANSWER) + 1) if p not in ANSWER]


@torch.no_grad()
def definitions(model: PreTrainedModel, ids: Tensor, spans: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """From eager attention weights and value states, position by position."""
    length = max(ANSWER)
    with captured_values(model) as values:
        attentions = model(ids[:, :length], output_attentions=True, use_cache=False).attentions
    needle = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        needle[start:end] = True
    names = ("needle_hit", "qrhead", "headkv", "contrastive", "locos_wrong", "locos_foil", "dla_foil")
    result = {name: np.full((len(attentions), attentions[0].shape[1]), np.nan) for name in names}
    for layer in attention_layers(model):
        alpha = attentions[layer.number][0]  # (H, rows, N)
        seen = visible_keys(model, layer.number, length)
        mass = alpha[:, :, needle].sum(-1)  # (H, rows)
        sees = (seen & needle).any(-1)  # (rows,)
        value = values[layer.number][0].repeat_interleave(len(alpha) // values[layer.number].shape[1], 0)

        def locos(row: int, token: int, alpha=alpha, seen=seen, value=value, layer=layer) -> Tensor:
            w = (model.lm_head.weight[token] @ layer.projection.weight).view(len(alpha), -1)
            phi = alpha[:, row] * torch.einsum("hd,hnd->hn", w, value)
            n, others = int((needle & seen[row]).sum()), int((~needle & seen[row]).sum())
            return phi[:, needle].sum(-1) - n / others * phi[:, ~needle].sum(-1)

        def dla(row: int, token: int, alpha=alpha, value=value, layer=layer) -> Tensor:
            w = (model.lm_head.weight[token] @ layer.projection.weight).view(len(alpha), -1)
            return (alpha[:, row] * torch.einsum("hd,hnd->hn", w, value)).sum(-1)

        def mean(rows: list[Tensor], like=alpha) -> np.ndarray:
            return torch.stack(rows).mean(0).numpy() if rows else np.full(len(like), np.nan)

        def keep(name: str, value: np.ndarray, number=layer.number) -> None:
            result[name][number] = value

        last = PARTS.prompt_tokens - 1
        if sees[last]:
            keep("needle_hit", needle[alpha[:, last].argmax(-1)].double().numpy())
        question = range(*PARTS.question)
        if sees[list(question)].any():
            keep("qrhead", mean([mass[:, row] for row in question]))
        anchors = list(range(PARTS.prompt_tokens - 8, PARTS.prompt_tokens))
        if sees[anchors].any():
            keep("headkv", mass[:, anchors].amax(-1).numpy())
        of_answer = mean([mass[:, p - 1] for p in ANSWER if sees[p - 1]])
        keep("contrastive", np.maximum(of_answer - mean([mass[:, p - 1] for p in REPLY]), 0))
        pairs = [(p - 1, int(ids[0, p]), f) for p, f in zip(ANSWER, FOIL, strict=False) if sees[p - 1]]
        all_pairs = [(p - 1, int(ids[0, p]), f) for p, f in zip(ANSWER, FOIL, strict=False)]
        keep("dla_foil", mean([dla(row, answer) - dla(row, foil) for row, answer, foil in all_pairs]))
        keep("locos_wrong", mean([locos(row, foil) for row, _, foil in pairs]))
        keep("locos_foil", mean([locos(row, answer) - locos(row, foil) for row, answer, foil in pairs]))
    return result


@pytest.mark.parametrize("needle", NEEDLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_detectors_are_their_definitions(family: str, needle: str) -> None:
    spans = NEEDLES[needle]
    model = build(family, "eager", dtype=torch.float64)
    ids = tokens(1, LENGTH)
    expected = definitions(model, ids, spans)
    scores = score_tokens(model, ids, spans, ANSWER, parts=PARTS)
    assert set(scores.others) == {detector.name for detector in DETECTORS if "lens" not in detector.needs} - set(ARRAYS)
    for name, array in expected.items():
        assert_close(scores.others[name], array, ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_further_detectors_leave_the_published_ones_as_they_are(family: str) -> None:
    model = build(family, dtype=torch.float64)
    ids, spans = tokens(1, LENGTH), NEEDLES["in a window"]
    alone, together = score_tokens(model, ids, spans, ANSWER), score_tokens(model, ids, spans, ANSWER, parts=PARTS)
    for name in ARRAYS:
        assert_close(together.array(name), alone.array(name), ROUNDING)


def test_logit_units_come_along() -> None:
    model, ids, spans = build("gemma3", dtype=torch.float64), tokens(1, LENGTH), NEEDLES["in a window"]
    both = score_tokens(model, ids, spans, ANSWER, parts=PARTS)
    frozen = score_tokens(model, ids, spans, ANSWER, norm="frozen")
    assert_close(both.others["locos_frozen"], frozen.score, ROUNDING)
    assert_close(both.others["dla_frozen"], frozen.dla, ROUNDING)
    assert both.meta["frozen_completeness"].keys() == frozen.meta["completeness"].keys()
    assert "locos_frozen" not in score_tokens(model, ids, spans, ANSWER, norm="frozen", parts=PARTS).others


def test_logit_units_that_cannot_be_had_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedModelError("no path")

    monkeypatch.setattr(targets_module, "attribute_heads", refuse)
    scores = score_tokens(build("llama"), tokens(1, LENGTH), (3, 6), ANSWER, parts=PARTS)
    assert scores.meta["frozen_unavailable"] == "no path"
    assert not any("frozen" in name for name in scores.others)


def test_a_foil_that_is_the_answer_is_none() -> None:
    ids = tokens(1, LENGTH)
    same = PARTS._replace(foil_ids=ids[0, ANSWER].tolist())
    scores = score_tokens(build("llama", dtype=torch.float64), ids, (3, 6), ANSWER, parts=same)
    assert not any("foil" in name or "wrong" in name for name in scores.others)


def test_tokens_that_the_foil_shares_with_the_answer_do_not_count() -> None:
    """Numbers may begin with the same space: toward it the foil is the answer."""
    model, ids = build("llama", dtype=torch.float64), tokens(1, LENGTH)
    last = [int(ids[0, ANSWER[0]]), int(ids[0, ANSWER[1]]), 5]
    found = score_tokens(model, ids, (3, 6), ANSWER, parts=PARTS._replace(foil_ids=last)).others
    alone = score_tokens(model, ids, (3, 6), ANSWER[2:], parts=PARTS._replace(foil_ids=[5])).others
    for name in ("locos_foil", "locos_wrong", "dla_foil"):
        assert_close(found[name], alone[name], ROUNDING)


def test_what_is_not_known_of_a_prompt_is_not_scored() -> None:
    parts = PromptParts(prompt_tokens=21)
    scores = score_tokens(build("llama"), tokens(1, LENGTH), (3, 6), ANSWER, parts=parts)
    assert {"needle_hit", "headkv", "contrastive", "locos_frozen"} <= set(scores.others)
    assert not {"qrhead", "locos_foil", "locos_wrong"} & set(scores.others)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_tokens": 23}, r"prompt_tokens: expected 1\.\.22, in front of the answer, got 23"),
        ({"prompt_tokens": 0}, r"prompt_tokens: expected 1\.\.22"),
        ({"question": (5, 5)}, r"question: expected 0 <= start < end <= 21, got \(5, 5\)"),
        ({"question": (5, 22)}, r"question: expected 0 <= start < end <= 21"),
        ({"lead_tokens": 21}, r"lead_tokens: expected 0\.\.20, got 21"),
        ({"foil_ids": [-1]}, r"foil_ids: expected token ids of the model's vocabulary"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_tokens(build("llama"), tokens(1, LENGTH), (3, 6), ANSWER, parts=PARTS._replace(**changes))


def test_rows_are_recorded_once() -> None:
    rows = Rows.of(ANSWER, PARTS, [5, 6, 7])
    assert rows.recorded == sorted({*range(11, 15), *range(13, 21), *(p - 1 for p in ANSWER), *(p - 1 for p in REPLY)})
    places = np.array(rows.recorded)
    assert rows.foil_steps == [1] and places[rows.foil].tolist() == [ANSWER[1] - 1]  # FOIL begins with 5, too
    assert places[rows.answer].tolist() == [p - 1 for p in ANSWER]
    assert places[rows.reply].tolist() == [p - 1 for p in REPLY]


def test_the_published_detectors_need_nothing_more() -> None:
    assert [detector.name for detector in detectors_for(())] == list(ARRAYS)
    assert in_order(["zzz", "qrhead", "score", "aaa"]) == ["score", "qrhead", "aaa", "zzz"]


def named(value: float, **others: float) -> HeadScores:
    arrays = {name: np.full((2, 3), value) for name in ARRAYS}
    return HeadScores(**arrays, others={name: np.full((2, 3), of) for name, of in others.items()})


def test_named_arrays_are_ranked_saved_and_averaged_like_the_others(tmp_path) -> None:
    one = named(1.0, qrhead=0.25, headkv=0.5)
    one.others["qrhead"][1, 2] = 0.75
    one.save_pretrained(tmp_path)
    again = HeadScores.from_pretrained(tmp_path)
    assert again.names == [*ARRAYS, *sorted(one.others)]
    assert again.top(1, by="qrhead") == [(1, 2)]
    assert again.found(by="qrhead")[0] == (1, 2)
    mean = HeadScores.mean([one, named(3.0, qrhead=0.75)])
    assert mean.others.keys() == {"qrhead"}
    assert mean.array("qrhead")[0, 0] == 0.5


@pytest.mark.parametrize(
    "others, message",
    [
        ({"score": np.ones((2, 3))}, "others: expected names of further detectors, got 'score'"),
        ({"ci_low": np.ones((2, 3))}, "others: expected names"),
        ({"a b": np.ones((2, 3))}, "others: expected names"),
        ({"mine": np.ones((3, 2))}, r"mine: expected an array of real numbers, \(2, 3\)"),
    ],
)
def test_named_arrays_are_checked(others: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(named(1.0), others=others)
