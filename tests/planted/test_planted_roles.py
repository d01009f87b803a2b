"""The planted heads are what their roles say, by the definitions of the detectors: the ground truth of other tests."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from locos_fast import planted
from locos_fast.planted.model import KINDS, PlantedModel
from locos_fast.prompts.trials import Trial
from tests.oracles.planted_trials import make_trials

Head = tuple[int, int]


class Detectors(NamedTuple):
    """(layers, heads) each, for the row that predicts the answer."""

    locos: Tensor
    attention_spatial: Tensor
    dla: Tensor
    wu: Tensor


@torch.inference_mode()
def detect(model: LlamaForCausalLM, trial: Trial) -> Detectors:
    """The four scores as they are defined, from the attention weights and values of a whole forward pass."""
    config = model.config
    layers, heads, head_dim = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    values: list[Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output[0]))
        for layer in model.model.layers
    ]
    prompt = torch.tensor([trial.prompt_ids])
    model.set_attn_implementation("eager")
    attentions = model(prompt, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()

    start, end = trial.needle_span
    needle, keys = end - start, trial.length
    unembedding = model.lm_head.weight[trial.answer_ids[0]]
    scores = Detectors(*(torch.zeros(layers, heads) for _ in range(4)))
    for layer, (attention, value) in enumerate(zip(attentions, values, strict=True)):
        alpha = attention[0, :, -1]  # (H, N)
        output = model.model.layers[layer].self_attn.o_proj.weight.view(-1, heads, head_dim)
        direction = torch.einsum("dhc,d->hc", output, unembedding)
        value = value.view(keys, -1, head_dim).repeat_interleave(heads // config.num_key_value_heads, 1)  # (N, H, D)
        phi = alpha * torch.einsum("hc,nhc->hn", direction, value)
        for score, x in [(scores.locos, phi), (scores.attention_spatial, alpha)]:
            inside = x[:, start:end].sum(-1)
            score[layer] = inside - needle / (keys - needle) * (x.sum(-1) - inside)
        scores.dla[layer] = phi.sum(-1)
        top = alpha.argmax(-1)
        scores.wu[layer] = (start <= top) & (top < end) & (prompt[0, top] == trial.answer_ids[0])
    return scores


def mean_scores(model: PlantedModel, kind: str, *, length: int, count: int) -> Detectors:
    scores = [detect(model.model, trial) for trial in make_trials(length, kind, count)]
    return Detectors(*(torch.stack(each).mean(0) for each in zip(*scores, strict=True)))


def found(score: Tensor) -> set[Head]:
    """Heads with at least a tenth of the largest score."""
    return {(layer, head) for layer, head in (score >= 0.1 * score.max()).nonzero().tolist()}


@pytest.fixture(scope="module", params=KINDS)
def scored(request: pytest.FixtureRequest, model: PlantedModel) -> tuple[str, Detectors]:
    return request.param, mean_scores(model, request.param, length=256, count=3)


def test_locos_finds_the_planted_heads_and_nothing_else(model: PlantedModel, scored: tuple[str, Detectors]) -> None:
    kind, scores = scored
    assert found(scores.locos) == set(model.heads[kind])
    other = model.heads["literal" if kind == "non_literal" else "non_literal"]
    assert all(scores.locos[head] == 0 for head in other)


def test_weakest_planted_head_is_half_as_strong_as_the_strongest(
    model: PlantedModel, scored: tuple[str, Detectors]
) -> None:
    kind, scores = scored
    planted_scores = torch.stack([scores.locos[head] for head in model.heads[kind]])
    assert planted_scores.min() > 0.5 * planted_scores.max()
    assert planted_scores.argsort(descending=True).tolist() == [0, 1, 2]


def test_attention_spatial_also_finds_the_read_only_decoys(model: PlantedModel, scored: tuple[str, Detectors]) -> None:
    kind, scores = scored
    assert found(scores.attention_spatial) == {*model.heads[kind], *model.heads["read_only"]}


def test_dla_also_finds_the_write_only_decoys(model: PlantedModel, scored: tuple[str, Detectors]) -> None:
    kind, scores = scored
    assert found(scores.dla) == {*model.heads[kind], *model.heads["write_only"]}


def test_wu_score_credits_looking_and_is_blind_to_non_literal_answers(
    model: PlantedModel, scored: tuple[str, Detectors]
) -> None:
    kind, scores = scored
    if kind == "literal":
        assert all(scores.wu[head] == 1 for head in [*model.heads["literal"], *model.heads["read_only"]])
    else:
        assert not scores.wu.any()


def test_decoys_and_noise_score_next_to_nothing_at_512_tokens(model: PlantedModel) -> None:
    for kind in KINDS:
        locos = detect(model.model, planted.trial(512, kind, depth=40, seed=11)).locos
        weakest = min(locos[head].item() for head in model.heads[kind])
        for head in [*model.heads["read_only"], *model.heads["write_only"]]:
            assert abs(locos[head].item()) < 0.01 * weakest
        others = locos.clone()
        for head in model.heads[kind]:
            others[head] = 0
        assert others.abs().max() < 0.01 * weakest
