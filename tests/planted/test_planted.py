"""The planted model answers, and its heads are what their roles say: the ground truth of every other test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM

from locos_fast import planted
from locos_fast.planted.model import KINDS, PlantedModel
from locos_fast.planted.vocabulary import CITIES, NAMES, TOKENS
from locos_fast.planted.weights import POSITION_FREQUENCIES
from locos_fast.prompts.trials import Trial

Head = tuple[int, int]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, PlantedModel]:
    return {dtype: planted.build(dtype=dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def model(models: dict[torch.dtype, PlantedModel]) -> PlantedModel:
    return models[torch.float32]


def make_trials(length: int, kind: str, count: int) -> list[Trial]:
    return [planted.trial(length, kind, depth=100 * i / max(count - 1, 1), seed=i) for i in range(count)]


@torch.inference_mode()
def recall(model: LlamaForCausalLM, trials: list[Trial]) -> float:
    """Share of the trials, all of one length, whose answer has the largest logit."""
    prompts = torch.tensor([trial.prompt_ids for trial in trials])
    answers = torch.tensor([trial.answer_ids[0] for trial in trials])
    logits = model(prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
    return (logits.argmax(-1) == answers).float().mean().item()


# --- answers


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
        model(ids[None], position_ids=seen[None], attention_mask=torch.ones(1, len(seen)), past_key_values=cache)
        for layer in range(layers):
            keys[layer].append(cache.layers[layer].keys[:, :, start - end :])
            values[layer].append(cache.layers[layer].values[:, :, start - end :])
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.cat(keys[layer], 2), torch.cat(values[layer], 2), layer)
    return model(torch.tensor([prompt_ids[-last:]]), past_key_values=cache).logits[0, -1]


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


# --- roles


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


# --- ablation


@contextmanager
def zeroed(model: LlamaForCausalLM, heads: Iterable[Head]) -> Iterator[None]:
    """Zero what each of the heads hands to its output projection."""

    def hook_for(head: int):
        own = slice(head * model.config.head_dim, (head + 1) * model.config.head_dim)

        def zero(module, inputs):
            output = inputs[0].clone()
            output[..., own] = 0
            return (output,)

        return zero

    hooks = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook_for(head)) for layer, head in heads
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_the_planted_heads_destroys_the_answer(model: PlantedModel, kind: str) -> None:
    trials = make_trials(64, kind, 16)
    with zeroed(model.model, model.heads[kind]):
        assert recall(model.model, trials) <= 1 / len(NAMES)
    assert recall(model.model, trials) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_random_heads_of_the_same_layers_does_not(model: PlantedModel, kind: str) -> None:
    heads = model.model.config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        control = []
        for layer, planted_head in model.heads[kind]:
            head = int(torch.randint(heads - 1, (1,), generator=generator))
            control.append((layer, head + (head >= planted_head)))
        with zeroed(model.model, control):
            assert recall(model.model, make_trials(64, kind, 16)) >= 0.9


@pytest.mark.parametrize("role", ["read_only", "write_only"])
def test_ablating_decoys_changes_no_answer(model: PlantedModel, role: str) -> None:
    with zeroed(model.model, model.heads[role]):
        assert all(recall(model.model, make_trials(64, kind, 16)) == 1.0 for kind in KINDS)


@pytest.mark.parametrize("which", [0, 1])
def test_either_positional_head_is_necessary(model: PlantedModel, which: int) -> None:
    with zeroed(model.model, [model.heads["positional"][which]]):
        assert all(recall(model.model, make_trials(64, kind, 16)) <= 1 / len(NAMES) for kind in KINDS)


# --- files


@pytest.fixture(scope="module", params=DTYPES)
def saved(
    request: pytest.FixtureRequest, models: dict[torch.dtype, PlantedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PlantedModel, Path]:
    directory = tmp_path_factory.mktemp("planted")
    models[request.param].save_pretrained(directory)
    return models[request.param], directory


def test_loads_like_any_other_model(saved: tuple[PlantedModel, Path]) -> None:
    original, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trial = original.trial(120, "literal", depth=50, seed=0)
    text = original.tokenizer.decode(trial.prompt_ids, skip_special_tokens=True)
    assert loaded.dtype == original.model.dtype
    assert tokenizer(text)["input_ids"] == trial.prompt_ids
    prompt = torch.tensor([trial.prompt_ids])
    with torch.inference_mode():
        assert torch.equal(loaded(prompt).logits, original.model(prompt).logits)


def test_roles_lie_beside_the_model(saved: tuple[PlantedModel, Path]) -> None:
    original, directory = saved
    written = json.loads((directory / "planted_heads.json").read_text())
    assert written == {role: [list(head) for head in heads] for role, heads in original.heads.items()}
    assert PlantedModel.from_pretrained(directory).heads == original.heads


def test_roles_do_not_overlap(model: PlantedModel) -> None:
    heads = [head for role in model.heads.values() for head in role]
    assert list(model.heads) == ["positional", "literal", "non_literal", "read_only", "write_only"]
    assert len(heads) == len(set(heads))


def test_load_refuses_a_folder_without_roles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"directory: .*planted_heads\.json"):
        PlantedModel.from_pretrained(tmp_path)


def test_save_refuses_a_file(model: PlantedModel, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="directory: "):
        model.save_pretrained(tmp_path / "taken")


# --- determinism and errors of build


def test_same_seed_same_model() -> None:
    first, again, other = (planted.build(layers=4, heads=4, head_dim=64, seed=seed) for seed in (1, 1, 2))
    same = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert first.heads == again.heads
    assert all(torch.equal(a, b) for a, b in same)
    assert first.heads != other.heads


@pytest.mark.parametrize(
    "argument",
    [{"layers": 3}, {"heads": 2}, {"heads": 6}, {"kv_heads": 5}, {"kv_heads": 0}, {"head_dim": 62}, {"noise": -1.0}],
)
def test_build_names_the_argument_that_does_not_fit(argument: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(argument))}: expected"):
        planted.build(**argument)


# --- tokenizer


def test_tokenizer_knows_its_words_and_no_others(model: PlantedModel) -> None:
    tokenizer = model.tokenizer
    assert len(TOKENS) == len(set(TOKENS)) == len(tokenizer)
    assert tokenizer.tokenize("Louvre hosts Ada. dragons") == ["Louvre", "hosts", "Ada", ".", "[UNK]"]
    with_bos = tokenizer("the river")["input_ids"]
    assert with_bos[0] == tokenizer.bos_token_id
    assert tokenizer("the river", add_special_tokens=False)["input_ids"] == with_bos[1:]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}) == 4


# --- trials


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(8, 700),
    kind=st.sampled_from(KINDS),
    depth=st.floats(0, 100),
    seed=st.integers(0, 2**32),
)
def test_trial_is_what_it_says(length: int, kind: str, depth: float, seed: int) -> None:
    trial = planted.trial(length, kind, depth=depth, seed=seed)
    words = [TOKENS[token] for token in trial.prompt_ids]
    start, end = trial.needle_span
    assert len(words) == trial.length == length
    assert words[0] == "[BOS]"
    assert " ".join(words[start:end]) == trial.needle
    assert " ".join(words[-3:]) == trial.question
    assert [TOKENS[token] for token in trial.answer_ids] == [trial.answer]
    assert words.count(trial.answer) == (1 if kind == "literal" else 0)
    assert trial.answer in (NAMES if kind == "literal" else CITIES)
    assert abs(start - 1 - depth / 100 * (length - 8)) <= 12  # at most one sentence from where it should be
    assert trial == planted.trial(length, kind, depth=depth, seed=seed)


def test_trial_tells_where_the_answer_lies() -> None:
    trial = planted.trial(50, "literal", depth=0, seed=0)
    assert trial.input_ids.shape == (1, 51)
    assert trial.input_ids.dtype == torch.int64
    assert trial.input_ids[0, trial.answer_positions].tolist() == trial.answer_ids


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("length", {"length": 7, "kind": "literal", "depth": 50, "seed": 0}),
        ("kind", {"length": 64, "kind": "figurative", "depth": 50, "seed": 0}),
        ("depth", {"length": 64, "kind": "literal", "depth": 101, "seed": 0}),
        ("depth", {"length": 64, "kind": "literal", "depth": float("nan"), "seed": 0}),
    ],
)
def test_trial_names_the_argument_that_is_wrong(argument: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        planted.trial(**arguments)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("answer_ids", {"answer_ids": []}),
        ("needle_span", {"needle_span": (4, 4)}),
        ("needle_span", {"needle_span": (-1, 4)}),
        ("needle_span", {"needle_span": (4, 11)}),
        ("depth", {"depth": -0.1}),
        ("length", {"length": 9}),
    ],
)
def test_trial_refuses_impossible_fields(field: str, change: dict) -> None:
    fields = {
        "prompt_ids": list(range(10)),
        "needle_span": (2, 10),
        "answer_ids": [3],
        "question": "q",
        "needle": "n",
        "answer": "a",
        "depth": 0.0,
        "length": 10,
        "id": "t",
    }
    assert Trial(**fields).needle_span == (2, 10)
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        Trial(**{**fields, **change})
