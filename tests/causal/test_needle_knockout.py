"""A head that may not see the needle attends to the rest as if the needle were masked, whatever computes attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from locos_fast.causal import needle_knockout
from locos_fast.causal.ablation import ablate
from locos_fast.models.architecture import UnsupportedModelError, attention_layers, head_count
from locos_fast.models.attention_registry import RecordingError
from locos_fast.scoring.attribute_tokens import attribute_tokens
from locos_fast.scoring.recording import record
from tests.oracles import architecture_models, further_families, listening
from tests.oracles.cached_forward import forward_with_cache
from tests.oracles.tiny_models import PAIRS, UNCOMPILED_FLEX, build, tokens
from tests.oracles.written_out import norms_in_double

LENGTH, NEEDLE = 27, (6, 11)  # more than three windows of 8
ROUNDING = 1e-5  # transformers' norms and eager softmax work in float32 in any dtype
EXACT = 1e-9
FLOAT32 = 64 * 2**-23

pytestmark = [*UNCOMPILED_FLEX, pytest.mark.usefixtures("no_gradients")]


def every_head(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(layer.number, head) for layer in attention_layers(model) for head in range(head_count(layer))]


def knockout(model: PreTrainedModel, heads: list | None = None, needle: object = NEEDLE) -> object:
    return ablate(model, every_head(model) if heads is None else heads, mode="needle-knockout", needle=needle)


def logits(model: PreTrainedModel, ids: Tensor, **arguments: object) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


def assert_equal(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


# --- all heads: the needle is masked


def masked(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[:, slice(*NEEDLE)] = 0
    return {"attention_mask": mask, "position_ids": torch.arange(ids.shape[1])[None]}


# linear attention takes masked tokens out too, and no head hands them on there
ATTENDING = [name for name in architecture_models.FAMILIES if name not in ("qwen3_next", "gemma3_vision")]


@pytest.mark.parametrize("family", ATTENDING)
def test_without_any_head_seeing_it_the_prediction_is_that_of_a_masked_needle(family: str) -> None:
    model, ids = architecture_models.build(family), tokens(1, LENGTH)
    expected = logits(model, ids, **masked(ids))[:, NEEDLE[1] :]
    with knockout(model):
        found = logits(model, ids)[:, NEEDLE[1] :]
    assert_equal(found, expected, ROUNDING)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - logits(model, ids)[:, NEEDLE[1] :]).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_in_exact_arithmetic_it_is_the_same_to_the_last_digits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(family, "sdpa", dtype=torch.float64), tokens(1, LENGTH)
    norms_in_double(model, monkeypatch)
    expected = logits(model, ids, **masked(ids))[:, NEEDLE[1] :]
    with knockout(model):
        assert_equal(logits(model, ids)[:, NEEDLE[1] :], expected, EXACT)


# --- caches, implementations, blocks


@pytest.mark.parametrize("cache", ["dynamic", "rolling", "static"])
@pytest.mark.parametrize("family, attention", PAIRS)
def test_cached_steps_give_what_one_eager_prefill_gives(family: str, attention: str, cache: str) -> None:
    if (cache, attention) == ("static", "flex_attention"):
        pytest.skip("transformers' mask reads the length of the cache after it was updated")
    model, ids, heads = build(family, attention), tokens(2, LENGTH), [(0, 1), (1, 0), (2, 3)]
    eager = build(family, "eager")
    with knockout(eager, heads):
        expected = logits(eager, ids)
    filled = {
        "dynamic": lambda: DynamicCache(),
        "rolling": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH + 6),
    }[cache]()
    with knockout(model, heads):
        assert_equal(logits(model, ids), expected, FLOAT32)
        parts = ids.split([4, 9, *[1] * (LENGTH - 13)], 1)
        steps = [forward_with_cache(model, part, cache=filled, use_cache=True).logits for part in parts]
    assert_equal(torch.cat(steps, 1), expected, FLOAT32)


@pytest.mark.parametrize("family, attention", PAIRS)
def test_rows_are_taken_some_at_a_time(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(family, attention, dtype=torch.float64), tokens(1, LENGTH)
    with knockout(model):
        expected = logits(model, ids)
    monkeypatch.setattr(needle_knockout, "ROWS_AT_ONCE", 5)
    with knockout(model):
        assert_equal(logits(model, ids), expected, ROUNDING)


@pytest.mark.parametrize("family, attention", PAIRS)
def test_the_rest_may_be_summed_in_pieces(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is on a GPU, for few rows."""
    model, ids = build(family, attention), tokens(1, LENGTH)
    with knockout(model):
        expected = logits(model, ids)
    monkeypatch.setattr(
        needle_knockout, "_pieces", lambda _, n: [(start, min(start + 5, n)) for start in range(0, n, 5)]
    )
    with knockout(model):
        assert_equal(logits(model, ids), expected, FLOAT32)


@pytest.mark.parametrize("family, attention", PAIRS)
def test_padding_on_the_left_moves_the_needle(family: str, attention: str) -> None:
    model, ids = build(family, attention), tokens(1, LENGTH)
    with knockout(model):
        expected = logits(model, ids)
    padded = torch.cat([ids.new_zeros(1, 4), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    positions = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.arange(LENGTH)[None]], 1)
    with knockout(model, needle=(NEEDLE[0] + 4, NEEDLE[1] + 4)):
        assert_equal(logits(model, padded, attention_mask=mask, position_ids=positions)[:, 4:], expected, FLOAT32)


# --- which rows and heads change


def test_rows_that_do_not_see_it_and_other_heads_keep_their_bits() -> None:
    model, ids = build("mistral", "sdpa"), tokens(1, LENGTH)
    with listening.projection_inputs(model) as before:
        logits(model, ids)
        before = {layer: x.unflatten(-1, (4, -1)) for layer, x in before.items()}
    with listening.projection_inputs(model) as after, knockout(model, [(0, 2)]):
        logits(model, ids)
    changed = (after[0].unflatten(-1, (4, -1)) != before[0])[0].any(-1)  # (N, H)
    expected = torch.zeros_like(changed)
    expected[NEEDLE[0] : NEEDLE[1] + 7, 2] = True  # the last row whose window reaches the needle
    assert torch.equal(changed, expected)


def test_a_row_that_sees_nothing_else_gives_zero() -> None:
    for family, attention in PAIRS:
        model = build(family, attention)
        with listening.projection_inputs(model) as inputs, knockout(model, [(0, 1)], needle=(0, 5)):
            logits(model, tokens(1, LENGTH))
        head = inputs[0].unflatten(-1, (4, -1))[0, :, 1]
        assert head.any(-1).tolist() == [False] * 5 + [True] * (LENGTH - 5), (family, attention)


def test_a_head_that_looks_at_nothing_else_is_still_exact() -> None:
    """Subtracting what the needle gave would leave noise: its share of the attention is one in float32."""
    ids, heads = tokens(1, LENGTH), [(0, head) for head in range(4)]
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        model = build("llama", "sdpa", dtype=dtype)
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[0].self_attn, name).weight.mul_(4)
        with record(model, range(LENGTH), [NEEDLE]) as plain:
            logits(model, ids)
        with listening.projection_inputs(model) as inputs, knockout(model, heads):
            logits(model, ids)
        outputs[dtype] = inputs[0].unflatten(-1, (4, -1))[0].double()
        rest = plain[0].output[0] - plain[0].span_output[0, :, :, 0].transpose(0, 1)
        subtracted = rest / (1 - plain[0].mass[0, :, :, 0]).T[..., None]
        if dtype == torch.float32:
            by_subtraction, mass = subtracted.double(), plain[0].mass[0, :, :, 0].T
    full = mass[NEEDLE[1] :] > 1 - 1e-6
    assert full.any()
    errors = [(x - outputs[torch.float64])[NEEDLE[1] :][full] for x in (outputs[torch.float32], by_subtraction)]
    size = outputs[torch.float64].abs().max()
    assert errors[0].abs().max() <= 1e-3 * size  # scores of hundreds in float32
    assert not errors[1].abs().max() <= 0.1 * size


# --- several needles, several contexts


def test_several_spans_and_nested_contexts_hide_their_union(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", "sdpa", dtype=torch.float64), tokens(1, LENGTH)
    norms_in_double(model, monkeypatch)
    heads, others = [(0, 1), (1, 2)], [(0, 1), (0, 3), (2, 2)]
    with (
        knockout(model, [(0, 1)], [(3, 8), (6, 11), (20, 40)]),
        knockout(model, [(1, 2)], (3, 8)),
        knockout(model, [(0, 3), (2, 2)], [(6, 11), (20, 40)]),
    ):
        expected = logits(model, ids)
    first, second = (heads, (3, 8)), (others, [(6, 11), (20, 40)])
    with knockout(model, *first), knockout(model, *second):
        assert_equal(logits(model, ids), expected, EXACT)
    with knockout(model, *second), knockout(model, *first):
        assert_equal(logits(model, ids), expected, EXACT)


def test_each_row_has_its_own_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("mistral", "sdpa", dtype=torch.float64), tokens(3, LENGTH)
    norms_in_double(model, monkeypatch)
    needles, sets = torch.tensor([[[3, 8]], [[6, 11]], [[18, 25]]]), [[(0, 1), (1, 0)], [(2, 3)], [(0, 1)]]
    with knockout(model, sets, needles):
        per_row = logits(model, ids)
    with knockout(model, sets[0], needles):
        own_needle = logits(model, ids)
    for row in range(3):
        with knockout(model, sets[row], tuple(needles[row, 0].tolist())):
            assert_equal(per_row[[row]], logits(model, ids[[row]]), EXACT)
        with knockout(model, sets[0], tuple(needles[row, 0].tolist())):
            assert_equal(own_needle[[row]], logits(model, ids[[row]]), EXACT)


# --- what observers see


@pytest.mark.parametrize("family, attention", PAIRS)
def test_a_recording_takes_the_needle_out_of_these_heads_only(family: str, attention: str) -> None:
    model, ids, rows = build(family, attention, dtype=torch.float64), tokens(1, LENGTH), [7, 12, 26]
    spans = [(3, 9), NEEDLE]
    with record(model, rows, spans) as plain:
        logits(model, ids)
    with knockout(model, [(0, 1)]), record(model, rows, spans, verify=True) as kept:
        logits(model, ids)
    others, seen = [0, 2, 3], plain[0].span_visible[0, :, 1] > 0
    for name in ("span_output", "mass", "total_mass", "lse", "argmax"):
        assert torch.equal(getattr(kept[0], name)[:, others], getattr(plain[0], name)[:, others]), name
    assert torch.equal(kept[0].visible, plain[0].visible)
    assert not kept[0].mass[:, 1, :, 1].any()
    share = 1 - plain[0].mass[0, 1, :, 1]
    assert_equal(kept[0].lse[0, 1], plain[0].lse[0, 1] + share.log(), EXACT)
    assert bool((kept[0].lse[0, 1] < plain[0].lse[0, 1])[seen].all())
    rest = plain[0].output[0, :, 1] - plain[0].span_output[0, 1, :, 1]
    assert_equal(kept[0].output[0, :, 1], rest / share[:, None], 1e-6)


def test_attribution_takes_it_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", "sdpa", dtype=torch.float64), tokens(1, LENGTH)
    segments = [(0, 6), NEEDLE, (11, 25)]
    plain = attribute_tokens(model, ids, [25, 26], segments)
    with knockout(model, [(0, 1)]):
        kept = attribute_tokens(model, ids, [25, 26], segments)
    assert kept[0, 1, 1] == 0
    assert plain[0, 1, 1] != 0
    assert kept[0, 1, 0] != plain[0, 1, 0]
    assert (kept[0, 0] == plain[0, 0]).all()


def test_eager_weights_are_those_of_the_heads_as_they_see() -> None:
    for family in ("llama", "mistral", "gpt_oss"):
        model, ids = build(family, "eager", dtype=torch.float64), tokens(1, LENGTH)
        plain = model(ids, use_cache=False, output_attentions=True).attentions[0][0]
        with knockout(model, [(0, 1)]):
            kept = model(ids, use_cache=False, output_attentions=True).attentions[0][0]
        assert torch.equal(kept[[0, 2, 3]], plain[[0, 2, 3]])
        assert not kept[1, :, slice(*NEEDLE)].any()
        rest = plain[1].clone()
        rest[:, slice(*NEEDLE)] = 0
        share = 1 - plain[1, :, slice(*NEEDLE)].sum(-1, keepdim=True)
        usual = share[:, 0] > 1e-3
        assert_equal(kept[1][usual], (rest / share)[usual], ROUNDING)


# --- what cannot be done


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("DiffLlama", "calls its attention function several times"),
        ("Dory", "calls its attention function several times"),
        ("Doge", "a different mask for each head"),
    ],
)
def test_attention_that_cannot_be_followed_is_refused(name: str, why: str) -> None:
    model = further_families.build(name)
    with knockout(model), pytest.raises(UnsupportedModelError, match=why):
        logits(model, tokens(1, LENGTH))


def test_a_layer_that_attends_unseen_is_an_error() -> None:
    model = build("llama", "sdpa")
    with knockout(model), pytest.raises(RecordingError, match=r"layer 0 \(LlamaAttention\) was not seen to attend"):
        model.set_attn_implementation("eager")
        logits(model, tokens(1, LENGTH))


def test_it_is_hidden_again_after_a_forward_that_broke_off() -> None:
    model, ids = build("llama", "sdpa"), tokens(1, LENGTH)
    with knockout(model):
        expected = logits(model, ids)

        def stop(*_: object) -> None:
            raise RuntimeError("stop")

        handle = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            logits(model, ids)
        handle.remove()
        assert torch.equal(logits(model, ids), expected)
