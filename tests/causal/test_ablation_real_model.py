"""On a real model: what a mode does to an answer that the intact model gives."""

from __future__ import annotations

import pytest
import torch

from locos_fast.causal.ablation import ablate
from locos_fast.models.architecture import attention_layers, head_count
from locos_fast.models.loading import load

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_gradients")]


def test_without_any_head_seeing_the_needle_the_answer_is_that_of_a_masked_needle() -> None:
    model, tokenizer = load("smollm2", dtype="float32")
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 12
    before, needle, after = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (filler, " The special magic number of Oslo is 7301294.", f" {filler}The magic number of Oslo is")
    )
    ids, span = torch.tensor([before + needle + after]), (len(before), len(before) + len(needle))
    mask = torch.ones_like(ids)
    mask[:, slice(*span)] = 0
    positions = torch.arange(ids.shape[1])[None]
    intact = model(ids).logits[:, -1]
    masked = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    heads = [(layer.number, head) for layer in attention_layers(model) for head in range(head_count(layer))]
    with ablate(model, heads, mode="needle-knockout", needle=span):
        blind = model(ids).logits[:, -1]
    assert (blind - masked).abs().max() <= 1e-3 * masked.abs().max()
    assert (intact - masked).abs().max() > 0.1 * masked.abs().max()
    assert torch.equal(model(ids).logits[:, -1], intact)
