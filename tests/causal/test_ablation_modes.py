"""Every mode of `ablate` is what it says, computed by hand; in a prefill, in cached steps, behind a prefix; and gone
afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from locos_fast.causal.ablation import MODES, CalibratedMeans, ablate
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.attention_registry import registry
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.recording import record
from locos_fast.scoring.score import score_tokens
from tests.oracles import listening
from tests.oracles.cached_forward import forward_with_cache
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import build, tokens, visible_keys
from tests.oracles.written_out import Change, Head, norms_in_double, written_out

LENGTH, NEEDLE = 27, (6, 11)  # more than three windows of 8; the needle leaves the window of the last rows
CHOSEN = [(0, 1), (0, 2), (1, 0), (2, 3)]  # of both key/value heads, one of a group and not the other
EXACT = 1e-9
PROMPTS = [tokens(1, 19, seed=1), tokens(1, 8, seed=2)[0].tolist(), tokens(1, 31, seed=3)]

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    model = build(request.param, "sdpa", dtype=torch.float64)
    norms_in_double(model, monkeypatch)
    return model


# --- by hand


def tokens_of(prompts: list) -> Iterator[Tensor]:
    return (torch.as_tensor(prompt).view(1, -1) for prompt in prompts)


def by_hand(model: PreTrainedModel, mode: str, heads: list[Head], seed: int = 0) -> Change:
    runs = [written_out(model, ids) for ids in tokens_of(PROMPTS)]

    def of_chosen(change: Callable[[Head, Tensor], Tensor]) -> Callable[[Head, Tensor], Tensor]:
        return lambda head, x: change(head, x) if head in heads else x

    def mean(kind: str) -> Callable[[Head, Tensor], Tensor]:
        return lambda head, x: torch.cat([getattr(run, kind)[head] for run in runs]).mean(0).expand_as(x)

    def resample(head: Head, x: Tensor) -> Tensor:
        drawn = CalibratedMeans.of(model, PROMPTS).donors.drawn(range(len(x)), seed)
        return torch.cat([run.outputs[head] for run in runs])[drawn]

    def without_needle(_: Head, seen: Tensor) -> Tensor:
        return seen & ~((torch.arange(len(seen)) >= NEEDLE[0]) & (torch.arange(len(seen)) < NEEDLE[1]))

    def zero(_: Head, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    return {
        "output-zero": Change(output=of_chosen(zero)),
        "output-mean": Change(output=of_chosen(mean("outputs"))),
        "output-resample": Change(output=of_chosen(resample)),
        "query-zero": Change(query=of_chosen(zero)),
        "query-mean": Change(query=of_chosen(mean("queries"))),
        "needle-knockout": Change(seen=of_chosen(without_needle)),
    }[mode]


# --- ways to run a model: (1, N) ids -> logits of the last rows


def prefill(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits[0]


def in_steps(model: PreTrainedModel, ids: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    parts = ids.split([9, 5, *[1] * (LENGTH - 14)], 1)
    return torch.cat([forward_with_cache(model, part, cache=cache, use_cache=True).logits[0] for part in parts])


def behind_prefix(model: PreTrainedModel, ids: Tensor) -> Tensor:
    prefix = PrefixCache(model)
    prefix.extend(ids[:, :8])
    with prefix.branch():
        model(input_ids=tokens(1, 5, seed=9), **prefix.forward_arguments())
    with prefix.branch():
        return model(input_ids=ids[:, 8:], **prefix.forward_arguments()).logits[0]


def assert_equal(actual: Tensor, expected: Tensor, bound: float = EXACT) -> None:
    expected = expected[-len(actual) :]
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("run", [prefill, in_steps, behind_prefix])
@pytest.mark.parametrize("mode", MODES)
def test_equals_a_transformer_written_out_in_float64(
    model: PreTrainedModel, mode: str, run: Callable[[PreTrainedModel, Tensor], Tensor]
) -> None:
    ids = tokens(1, LENGTH)
    expected = written_out(model, ids, (by_hand(model, mode, CHOSEN),)).logits
    with ablate(model, CHOSEN, mode=mode, calibration=PROMPTS, needle=NEEDLE):
        assert_equal(run(model, ids), expected)
    intact = written_out(model, ids).logits
    assert_equal(prefill(model, ids), intact)
    assert (expected - intact).abs().max() > 1e-2 * intact.abs().max()  # the mode does something


@pytest.mark.parametrize("mode", MODES)
def test_generates_what_whole_forwards_predict(model: PreTrainedModel, mode: str) -> None:
    ids = tokens(1, 15)
    with ablate(model, CHOSEN, mode=mode, calibration=PROMPTS, needle=NEEDLE):
        generated = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert prefill(model, generated[:, :-1]).argmax(-1)[14:].tolist() == generated[0, 15:].tolist()
    assert model.generate(ids, max_new_tokens=8, do_sample=False).tolist() != generated.tolist()


def test_resampling_depends_on_its_seed(model: PreTrainedModel) -> None:
    ids, logits = tokens(1, LENGTH), []
    for seed in (0, 1):
        with ablate(model, CHOSEN, mode="output-resample", calibration=PROMPTS, seed=seed):
            logits.append(prefill(model, ids))
        assert_equal(logits[-1], written_out(model, ids, (by_hand(model, "output-resample", CHOSEN, seed),)).logits)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", ["output-zero", "query-zero", "needle-knockout"])
def test_nested_ablations_add_up(model: PreTrainedModel, outer: str, inner: str) -> None:
    """The inner one is calibrated on the intact model."""
    ids, others = tokens(1, LENGTH), [(0, 1), (1, 1), (2, 2)]
    given = {"calibration": PROMPTS, "needle": NEEDLE}
    expected = written_out(model, ids, (by_hand(model, outer, CHOSEN), by_hand(model, inner, others))).logits
    with ablate(model, CHOSEN, mode=outer, **given), ablate(model, others, mode=inner, **given):
        assert_equal(prefill(model, ids), expected)


def test_zero_queries_attend_to_all_visible_keys_alike() -> None:
    for family in ("llama", "mistral", "gemma3", "qwen3"):
        model = build(family, dtype=torch.float64)
        with listening.attention_calls(model) as calls, ablate(model, [(0, 1), (2, 2)], mode="query-zero"):
            model(tokens(1, LENGTH), use_cache=False)
        for layer, head in ((0, 1), (2, 2)):
            seen = visible_keys(model, layer, LENGTH).double()
            uniform = seen / seen.sum(-1, keepdim=True)
            assert (calls[layer].weights[0, head] - uniform).abs().max() <= 1e-7  # of a softmax in float32
            assert (calls[layer].weights[0, 0] - uniform).abs().max() > 0.1


# --- rows of a batch


@pytest.mark.parametrize("mode", MODES)
def test_each_row_has_its_own_heads(model: PreTrainedModel, mode: str) -> None:
    sets, ids = [CHOSEN, [], [(1, 3), (2, 0), (2, 3)], [(0, 1)]], tokens(4, LENGTH)
    given = {"calibration": CalibratedMeans.of(model, PROMPTS), "needle": NEEDLE}
    with ablate(model, sets, mode=mode, **given):
        together = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = ids.split([13, *[1] * (LENGTH - 13)], 1)
        steps = torch.cat([forward_with_cache(model, part, cache=cache).logits for part in parts], 1)
    for row, heads in enumerate(sets):
        with ablate(model, heads, mode=mode, **given) if heads else contextlib.nullcontext():
            alone = prefill(model, ids[[row]])
        assert_equal(together[row], alone)
        assert_equal(steps[row], alone)


@pytest.mark.parametrize("mode", MODES)
def test_as_many_lists_as_rows_are_expected(mode: str) -> None:
    model = build("llama", "sdpa")
    with (
        ablate(model, [[(0, 1)], [(0, 2)]], mode=mode, calibration=PROMPTS, needle=NEEDLE),
        pytest.raises(ValueError, match="heads: expected one entry for each of the 3 rows of the batch, got 2"),
    ):
        model(tokens(3, LENGTH))


# --- what is left behind


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_everything_is_put_back_also_after_an_exception(mode: str, attention: str) -> None:
    model, ids = build("gemma3", attention), tokens(1, LENGTH)
    before, entries, config = model(ids).logits, listening.registry(), model.config.to_dict()
    for failing in (False, True):
        with (
            pytest.raises(RuntimeError, match="stop") if failing else contextlib.nullcontext(),
            ablate(model, CHOSEN, mode=mode, calibration=PROMPTS, needle=NEEDLE),
        ):
            assert not torch.equal(model(ids).logits, before)
            if failing:
                raise RuntimeError("stop")
        assert torch.equal(model(ids).logits, before)
        assert listening.registry() == entries
        assert (hooks(model), registry.interventions, registry.observers) == (0, {}, {})
        assert model.config.to_dict() == config
        assert not any("forward" in vars(module) for module in model.modules())


def test_everything_is_put_back_after_an_exception_in_a_calibration() -> None:
    model = build("llama", "sdpa")
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    for mode in ("output-mean", "output-resample", "query-mean"):
        with pytest.raises(RuntimeError, match="stop"), ablate(model, CHOSEN, mode=mode, calibration=PROMPTS):
            pass
    handle.remove()
    assert (hooks(model), registry.interventions, registry.observers) == (0, {}, {})


# --- recordings


@pytest.mark.parametrize("mode", MODES)
def test_a_recording_sees_heads_as_ablated(model: PreTrainedModel, mode: str) -> None:
    """Whichever is entered first: a calibration inside the recording is not recorded."""
    ids, given = tokens(1, LENGTH), {"mode": mode, "calibration": PROMPTS, "needle": NEEDLE}
    with record(model, [20, 26], [NEEDLE], verify=True) as inside, ablate(model, CHOSEN, **given):
        model(ids, use_cache=False)
    with ablate(model, CHOSEN, **given), record(model, [20, 26], [NEEDLE], verify=True) as outside:
        model(ids, use_cache=False)
    for layer in inside:
        assert all(torch.equal(a, b) for a, b in zip(inside[layer], outside[layer], strict=True))
    if mode in ("query-zero", "query-mean", "needle-knockout"):  # they act on attention, which is what is recorded
        by_rows = written_out(model, ids, (by_hand(model, mode, CHOSEN),)).outputs
        for (layer, head), output in by_rows.items():
            assert_equal(inside[layer].output[0, :, head], output[[20, 26]])


def test_scores_are_of_the_model_as_ablated() -> None:
    ids, head = tokens(1, LENGTH), (0, 1)

    def scores(mode: str) -> HeadScores:
        model = build("llama", "sdpa")
        with ablate(model, [head], mode=mode, calibration=PROMPTS, needle=NEEDLE):
            return score_tokens(model, ids, NEEDLE, [22, 26], norm="frozen")

    blind, uniform, silent = (scores(mode) for mode in ("needle-knockout", "query-zero", "output-zero"))
    for found in (blind, uniform, silent):
        assert found.meta["completeness"]["overall"] <= 1e-6
    assert blind.l_plus[head] == 0
    assert blind.l_minus[head] != 0
    assert abs(uniform.attention_spatial[head]) <= 1e-6  # the needle gets what any other keys get
    assert silent.dla[head] == 0
    for mode in ("output-mean", "output-resample"):  # what they put there came from no key
        with pytest.raises(UnsupportedModelError, match="is no factor per channel"):
            scores(mode)
