"""The planted model answers every question, however long the context is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from locos_fast import planted
from locos_fast.planted.model import KINDS, PlantedModel
from locos_fast.planted.weights import POSITION_FREQUENCIES
from tests.oracles.cached_forward import forward_with_cache
from tests.oracles.planted_trials import make_trials, recall

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_every_question(
    models: dict[torch.dtype, PlantedModel], dtype: torch.dtype, attention: str, kind: str
) -> None:
    model = models[dtype].model
    model.set_attn_implementation(attention)
    try:
        for length, count in [(8, 8), (64, 8), (512, 1)]:
            assert recall(model, make_trials(length, kind, count)) == 1.0, length
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_at_2000_tokens(models: dict[torch.dtype, PlantedModel], dtype: torch.dtype, kind: str) -> None:
    assert recall(models[dtype].model, [planted.trial(2000, kind, depth=30, seed=7)]) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), list(zip(DTYPES, KINDS, strict=True)))
def test_answers_at_8000_tokens(models: dict[torch.dtype, PlantedModel], dtype: torch.dtype, kind: str) -> None:
    assert recall(models[dtype].model, [planted.trial(8000, kind, depth=60, seed=7)]) == 1.0


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64},
        {"layers": 5, "heads": 8, "kv_heads": 1, "head_dim": 96},
        {"layers": 6, "heads": 8, "kv_heads": 2, "head_dim": 256, "seed": 5},
    ],
)
def test_answers_whatever_the_sizes(sizes: dict[str, int]) -> None:
    other = planted.build(**sizes)
    for kind in KINDS:
        assert recall(other.model, make_trials(100, kind, 5)) == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_with_100_000_positions_between_needle_and_question(
    models: dict[torch.dtype, PlantedModel], dtype: torch.dtype, kind: str
) -> None:
    trial = planted.trial(300, kind, depth=50, seed=3)
    position_ids = torch.arange(300)[None]
    position_ids[:, trial.needle_span[1] :] += 100_000
    prompt = torch.tensor([trial.prompt_ids])
    # Without a mask transformers takes the gap for the border between two packed sequences.
    with torch.inference_mode():
        logits = models[dtype].model(prompt, position_ids=position_ids, attention_mask=torch.ones_like(prompt)).logits
    assert logits[0, -1].argmax().item() == trial.answer_ids[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_answers_at_100_000_tokens(kind: str) -> None:
    small = planted.build(layers=4, heads=4, kv_heads=2, head_dim=64)
    trial = planted.trial(100_000, kind, depth=10, seed=4)
    assert long_prompt_logits(small.model, trial.prompt_ids).argmax().item() == trial.answer_ids[0]


@torch.inference_mode()
def long_prompt_logits(model: LlamaForCausalLM, prompt_ids: list[int], *, last: int = 8, block: int = 2000) -> Tensor:
    """Logits after the prompt. The last rows see every key; those before see [BOS] and their block, with an overlap."""
    layers = model.config.num_hidden_layers
    keys: list[list[Tensor]] = [[] for _ in range(layers)]
    values: list[list[Tensor]] = [[] for _ in range(layers)]
    for start in range(0, len(prompt_ids) - last, block):
        end = min(start + block, len(prompt_ids) - last)
        overlap = range(max(1, start - 8), start)
        seen = torch.tensor([*([0] if start else []), *overlap, *range(start, end)])
        ids = torch.tensor(prompt_ids)[seen]
        cache = DynamicCache()
        seen_mask = torch.ones(1, len(seen))
        forward_with_cache(model, ids[None], position_ids=seen[None], attention_mask=seen_mask, cache=cache)
        for layer in range(layers):
            keys[layer].append(cache.layers[layer].keys[:, :, start - end :])
            values[layer].append(cache.layers[layer].values[:, :, start - end :])
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.cat(keys[layer], 2), torch.cat(values[layer], 2), layer)
    return forward_with_cache(model, torch.tensor([prompt_ids[-last:]]), cache=cache).logits[0, -1]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_no_distance_rivals_the_copied_one(head_dim: int) -> None:
    frequencies = 1e12 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))[:POSITION_FREQUENCIES]
    loss = (1 - torch.cos(torch.arange(1, 200_001)[:, None] * frequencies)).sum(-1)
    assert loss.argmin().item() == 0  # the neighbour, which POSITION_MARGIN refers to


@pytest.mark.parametrize("kind", KINDS)
def test_generation_stops_after_the_answer(model: PlantedModel, kind: str) -> None:
    trial = model.trial(100, kind, depth=50, seed=2)
    generated = model.model.generate(torch.tensor([trial.prompt_ids]), max_new_tokens=6, do_sample=False)
    assert model.tokenizer.decode(generated[0, 100:]) == f"{trial.answer} [EOS]"
