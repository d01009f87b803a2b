"""What would give a wrong score in silence is refused: token ids of no token, numbers that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from locos_fast.models.cost import Meter
from locos_fast.scoring.attribute_tokens import attribute_tokens
from locos_fast.scoring.recording import record
from locos_fast.scoring.score import score_tokens
from tests.oracles.tiny_models import VOCABULARY, build, tokens

NEEDLE, ANSWER = (4, 9), [22, 24]
ids = tokens(1, 25)


def both(model: Any, input_ids: Any = ids, answer: Any = ANSWER) -> list[Any]:
    """Scoring and attribution of one prompt, to be called."""
    return [
        lambda: score_tokens(model, input_ids, NEEDLE, answer),
        lambda: attribute_tokens(model, input_ids, answer, [NEEDLE]),
    ]


def test_the_tiny_prompt_itself_is_accepted() -> None:
    for run in both(build("llama")):
        run()


# --- token ids


@pytest.mark.parametrize("position", [0, 22, 24])  # the last answer token is never fed
@pytest.mark.parametrize("token", [-1, -100, VOCABULARY, 10**9])
def test_ids_of_no_token_are_refused(position: int, token: int) -> None:
    wrong = ids.clone()
    wrong[0, position] = token
    for run in both(build("llama"), wrong):
        with pytest.raises(ValueError, match=rf"^input_ids: expected token ids .*, 0..{VOCABULARY - 1}, got {token}$"):
            run()


@pytest.mark.parametrize("contrast", [[-1, 3], [3, VOCABULARY], [3.7, 2], [3], 3, "median", {3, 4}, [None, 1]])
def test_a_contrast_of_no_tokens_is_refused(contrast: Any) -> None:
    with pytest.raises(ValueError, match=r"^contrast: expected .*, got "):
        score_tokens(build("llama"), ids, NEEDLE, ANSWER, contrast=contrast)


# --- arguments of the wrong type


@pytest.mark.parametrize("input_ids", [None, ids.tolist(), "text"])
def test_input_ids_of_another_type_are_named(input_ids: Any) -> None:
    for run in both(build("llama"), input_ids):
        with pytest.raises(ValueError, match=r"^input_ids: expected \(1, N\) int64, got (NoneType|list|str)"):
            run()


@pytest.mark.parametrize("answer", [None, 22, {22, 24}, "22", [None], [22.5]])
def test_answer_positions_of_another_type_are_named(answer: Any) -> None:
    for run in both(build("llama"), answer=answer):
        with pytest.raises(ValueError, match=r"^answer_positions: expected "):
            run()


@pytest.mark.parametrize("rows", [[20.9], torch.tensor([True, False]), [True, False], None, "12", torch.tensor([0.5])])
def test_rows_that_are_no_whole_numbers_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"^rows: expected .* whole numbers"), record(build("llama"), rows, [NEEDLE]):
        raise AssertionError("recording has begun")


def test_segments_and_needles_that_are_none_are_named() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="segments: expected"):
        attribute_tokens(model, ids, ANSWER, None)
    with pytest.raises(ValueError, match="needle_span: expected"):
        score_tokens(model, ids, None, ANSWER)


# --- numbers that are none


@pytest.mark.parametrize("norm", ["none", "frozen"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["q_proj", "v_proj", "o_proj"])
def test_one_weight_that_is_no_number_is_refused(part: str, value: float, norm: Any) -> None:
    model = build("llama")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[0, 0] = value
    message = "logits are not finite .* try another dtype"
    with pytest.raises(ValueError, match=message):
        score_tokens(model, ids, NEEDLE, ANSWER, norm=norm)
    with pytest.raises(ValueError, match=message):
        attribute_tokens(model, ids, ANSWER, [NEEDLE])


def test_an_infinite_unembedding_row_is_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[int(ids[0, 22]), 0] = -math.inf
    for run in both(model):
        with pytest.raises(ValueError, match="not finite"):
            run()


def test_layers_whose_window_hides_the_needle_are_still_no_error() -> None:
    scores = score_tokens(build("mistral"), ids, (0, 2), ANSWER)
    assert bool(torch.tensor(scores.score).isnan().all())
    assert bool(torch.tensor(scores.dla).isfinite().all())


def test_a_model_that_forbids_tokens_by_infinite_logits_is_scored() -> None:
    model = build("llama")
    allowed = int(ids[0, 22])
    others = torch.tensor([token for token in range(VOCABULARY) if token != allowed])

    def forbid(module: Any, args: Any, output: Any) -> None:
        output.logits.index_fill_(-1, others, -math.inf)

    model.register_forward_hook(forbid)
    score_tokens(model, ids, NEEDLE, [22])


# --- what a pass costs


@pytest.mark.parametrize("norm", ["none", "frozen"])
def test_the_weights_are_read_before_the_meter_starts(monkeypatch: pytest.MonkeyPatch, norm: Any) -> None:
    """Weights that are mapped from a file would else be charged to the first pass, and to one mode alone."""
    model, seen = build("llama"), []
    for module in model.modules():
        if getattr(module, "weight", None) is not None:
            module.register_forward_hook(lambda module, args, output: seen.append(module))
    read: list[set] = []
    start = Meter.__init__
    monkeypatch.setattr(Meter, "__init__", lambda meter, model: (read.append(set(seen)), start(meter, model))[1])
    score_tokens(model, ids, NEEDLE, ANSWER, norm=norm)
    assert read == [{module for module in model.modules() if getattr(module, "weight", None) is not None}]
