"""CRI is what whole runs with one head exchanged give, for every model and batch; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from locos_fast.causal import activation_patching
from locos_fast.causal.activation_patching import METRICS, cri
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.attention_registry import RecordingError
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.prompts.trials import Trial
from tests.oracles import architecture_models, further_families, tiny_models
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.definition import PROJECTIONS, text_layers
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import PLAIN_ROPE, WINDOW, tokens, visible_keys

LENGTH, NEEDLE, ANSWER = 3 * WINDOW + 3, (11, 17), [5, 9, 7]  # the needle begins beyond a window and ends inside one
FILLER = 3
ROUNDING = 1e-5  # of the largest logit: transformers' norms and softmax work in float32 in any dtype
HEADS = 4

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' about kernels that are not installed


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def trial(needle: tuple[int, int] = NEEDLE, answer: list[int] = ANSWER) -> Trial:
    ids = tokens(1, LENGTH)[0].tolist()
    asked = {"question": "", "needle": "", "answer": "", "depth": 50, "length": LENGTH, "id": ""}
    return Trial(prompt_ids=ids, needle_span=needle, answer_ids=answer, **asked)


def two_prompts(of: Trial, metric: str) -> tuple[Tensor, Tensor]:
    """Clean and corrupted, (1, N) each, as far as the metric reads them."""
    clean = [*of.prompt_ids, *(of.answer_ids[:-1] if metric == "answer_logprob" else [])]
    start, end = of.needle_span
    corrupted = [FILLER if start <= i < end else token for i, token in enumerate(clean)]
    return torch.tensor([clean]), torch.tensor([corrupted])


def value(metric: str, logits: Tensor, corrupted: Tensor) -> float:
    """The metric of (N, V) logits, given those of the corrupted run."""
    if metric == "answer_logprob":
        rows = logits[-len(ANSWER) :].softmax(-1)
        return float(torch.stack([rows[i, token].log() for i, token in enumerate(ANSWER)]).mean())
    foil = max((token for token in range(logits.shape[1]) if token != ANSWER[0]), key=lambda i: corrupted[-1, i])
    return float(logits[-1, ANSWER[0]] - logits[-1, foil])


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: float) -> None:
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    assert np.nanmax(np.abs(expected)) > 100 * bound  # there is something to agree on


# --- a transformer written out


def norm64(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def attend(model: PreTrainedModel, number: int, x: Tensor) -> Tensor:
    """(N, hidden) normed -> (N, H, D), head by head."""
    attention, n = model.model.layers[number].self_attn, len(x)
    dim, group = attention.head_dim, HEADS // 2
    cos, sin = (part[0] for part in model.model.rotary_emb(x[None], torch.arange(n)[None]))  # in float32, as it is

    def rotated(states: Tensor) -> Tensor:
        return states * cos + torch.cat([-states[:, dim // 2 :], states[:, : dim // 2]], -1) * sin

    seen = visible_keys(model, number, n) if model.config.model_type == "mistral" else torch.ones(n, n).tril().bool()
    outputs = []
    for head in range(HEADS):
        own, of_group = slice(head * dim, (head + 1) * dim), slice(head // group * dim, (head // group + 1) * dim)
        query = rotated(linear(x, attention.q_proj.weight[own]))
        key = rotated(linear(x, attention.k_proj.weight[of_group]))
        scores = (query @ key.T / dim**0.5).masked_fill(~seen, -torch.inf)
        outputs.append(scores.softmax(-1) @ linear(x, attention.v_proj.weight[of_group]))
    return torch.stack(outputs, 1)


def written_out(
    model: PreTrainedModel, ids: Tensor, patch: tuple[int, int, list[Tensor]] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, V) and the head outputs of every layer; `patch` takes one (layer, head) from other head outputs."""
    x, kept = model.model.embed_tokens.weight[ids[0]], []
    for number, layer in enumerate(model.model.layers):
        heads = attend(model, number, norm64(layer.input_layernorm, x))
        if patch is not None and patch[0] == number:
            heads[:, patch[1]] = patch[2][number][:, patch[1]]
        kept.append(heads)
        x = x + linear(heads.flatten(1), layer.self_attn.o_proj.weight)
        y, mlp = norm64(layer.post_attention_layernorm, x), layer.mlp
        gated = silu(linear(y, mlp.gate_proj.weight)) * linear(y, mlp.up_proj.weight)
        x = x + linear(gated, mlp.down_proj.weight)
    return linear(norm64(model.model.norm, x), model.lm_head.weight), kept


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_equals_a_transformer_written_out_in_float64(family: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, "sdpa")
    monkeypatch.setattr(type(model.model.norm), "forward", norm64)  # the model's own works in float32
    clean, corrupted = two_prompts(trial(), metric)
    base, _ = written_out(model, corrupted)
    _, outputs = written_out(model, clean)
    expected = np.empty((3, HEADS))
    for layer, head in np.ndindex(expected.shape):
        patched, _ = written_out(model, corrupted, (layer, head, outputs))
        expected[layer, head] = value(metric, patched, base) - value(metric, base, base)
    assert_close(cri(model, trial(), filler_id=FILLER, metric=metric), expected, 1e-9)


# --- whole runs of any model, with one slice of one projection's input exchanged


def projections(model: PreTrainedModel) -> dict[int, nn.Module]:
    layers = enumerate(text_layers(model)[1])
    return {i: module for i, layer in layers for name, module in layer.named_modules() if name in PROJECTIONS}


@contextmanager
def replaced(projection: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    forward = projection.forward
    projection.forward = lambda x: forward(change(x))
    try:
        yield
    finally:
        del projection.forward


def whole_runs(model: PreTrainedModel, metric: str, of: Trial) -> tuple[np.ndarray, float]:
    """CRI, and the largest logit."""
    clean, corrupted = two_prompts(of, metric)
    found, inputs = projections(model), {}

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[0]

    for number, projection in found.items():
        with replaced(projection, lambda x, number=number: inputs.setdefault(number, x)):
            run(clean)
    base = run(corrupted)
    expected = np.full((len(text_layers(model)[1]), HEADS), np.nan)
    for number, projection in found.items():
        width = inputs[number].shape[-1] // HEADS
        for head in range(HEADS):
            own = torch.arange(HEADS * width) // width == head
            with replaced(projection, lambda x, own=own, number=number: torch.where(own, inputs[number], x)):
                expected[number, head] = value(metric, run(corrupted), base) - value(metric, base, base)
    return expected, float(base.abs().max())


OTHERS = ("Afmoe", "Bamba", "BitNet", "Jamba", "Lfm2", "OPT")
KNOWN = [*FAMILIES, *(name for name in further_families.known(further_families.EXACT) if name in OTHERS)]


def of_any_kind(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return architecture_models.build(family)
    return further_families.build(family, "eager", dtype=torch.float64)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("family", KNOWN)
def test_equals_whole_runs_with_one_head_exchanged(family: str) -> None:
    """Gates (qwen3_next, Afmoe) and norms (BitNet) between heads and projection, windows, chunks, shared keys; linear
    attention, convolutions and recurrences, which are run whole."""
    model = of_any_kind(family)
    for metric in METRICS:
        expected, size = whole_runs(model, metric, trial())
        assert_close(cri(model, trial(), filler_id=FILLER, metric=metric, batch=5), expected, ROUNDING * size)


def test_layers_without_softmax_attention_are_nan() -> None:
    scores = cri(build("qwen3_next"), trial(), filler_id=FILLER)
    assert np.isnan(scores).any(-1).tolist() == [False, True, False]


# --- batches, prefixes, chunks


def without_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: PreTrainedModel) -> None:
        raise UnsupportedModelError("takes no cache")

    monkeypatch.setattr(activation_patching, "PrefixCache", refuse)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "qwen3_next"])
def test_batch_prefix_and_chunks_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, dtype=torch.float32)
    arguments: dict[str, Any] = {"filler_id": FILLER, "metric": "answer_logprob"}
    scores = [cri(model, trial(), batch=batch, **arguments) for batch in (1, 3, 8, 100)]
    scores.append(cri(model, trial(), batch=3, token_chunk=21, **arguments))
    without_prefix(monkeypatch)
    scores.append(cri(model, trial(), batch=3, **arguments))
    for other in scores[1:]:
        assert_close(other, scores[0], 1e-5)


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """Rows and tokens of each forward pass."""
    seen: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        hook.remove()


def test_only_what_follows_the_needles_beginning_runs_again() -> None:
    model, rest = build("llama"), LENGTH - NEEDLE[0]
    PrefixCache(model)  # which is shown once that the model continues from it
    with passes(model) as seen:
        cri(model, trial(), filler_id=FILLER, batch=5)
    assert seen == [(1, NEEDLE[0]), (1, rest), (1, rest), (5, rest), (5, rest), (2, rest)]


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    ("needle", "rope"), [((0, 6), PLAIN_ROPE), (NEEDLE, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})]
)
def test_nothing_before_the_needle_and_keys_that_move_are_run_whole(needle: tuple[int, int], rope: dict) -> None:
    model = tiny_models.build("llama", dtype=torch.float64, rope_parameters=rope)
    expected, size = whole_runs(model, METRICS[0], trial(needle))
    with passes(model) as seen:
        found = cri(model, trial(needle), filler_id=FILLER)
    assert_close(found, expected, ROUNDING * size)
    assert {n for _, n in seen} == {LENGTH}


def test_given_tokens_in_place_of_the_needle_are_used() -> None:
    model = build("llama")
    same = cri(model, trial(), corruption_ids=[FILLER] * 6)
    np.testing.assert_array_equal(same, cri(model, trial(), filler_id=FILLER))
    assert np.abs(same - cri(model, trial(), corruption_ids=[1, 2, 3, 4, 5, 6])).max() > 1e-3


def test_progress_counts_heads() -> None:
    told: list[tuple[int, int]] = []
    cri(build("llama"), trial(), filler_id=FILLER, batch=5, progress=lambda *done: told.append(done))
    assert told == [(5, 12), (10, 12), (12, 12)]


# --- what is left behind


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("where", ["between passes", "in a pass over the clean prompt", "in a patched pass"])
def test_everything_is_put_back_after_an_exception(where: str) -> None:
    model, ids = build("qwen3_next"), tokens(1, LENGTH)
    with torch.no_grad():
        before = model(ids).logits
    count, started = hooks(model), []

    def stop(*_: Any) -> None:
        started.append(None)
        if len(started) == {"between passes": 1, "in a pass over the clean prompt": 2, "in a patched pass": 4}[where]:
            raise RuntimeError("stop")

    last = model.model.layers[2].mlp.register_forward_pre_hook(stop if where != "between passes" else lambda *_: None)
    with pytest.raises(RuntimeError, match="stop"):
        cri(model, trial(), filler_id=FILLER, batch=5, progress=stop if where == "between passes" else None)
    last.remove()
    assert hooks(model) == count
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_a_cache_serves_several_rows_and_is_as_it_was_afterwards(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    with torch.inference_mode():
        runs = activation_patching._Runs.behind(model, ids[:, :20], rows=2)
        assert runs.prefix is not None
        held = [(layer.keys, layer.values) for layer in runs.prefix.cache.layers]
        before = runs.logits(ids[:, 20:])
        several = runs.logits(torch.cat([ids[:, 20:], tokens(1, LENGTH - 20, seed=1), ids[:, 20:]]))
        assert (several[[0, 2]] - before).abs().max() < ROUNDING * before.abs().max()
        assert torch.equal(runs.logits(ids[:, 20:]), before)
    for layer, (keys, values) in zip(runs.prefix.cache.layers, held, strict=True):
        assert layer.keys is keys
        assert layer.values is values


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metric": "logprob"}, "metric: expected one of first_token_logit_diff, answer_logprob, got 'logprob'"),
        ({"batch": 0}, "batch: expected at least one head, got 0"),
        ({"token_chunk": 0}, "size: expected at least one token"),
        ({"filler_id": None}, "corruption_ids: expected these or filler_id, got neither"),
        ({"corruption_ids": [1] * 6}, "corruption_ids: expected these or filler_id, got both"),
        (
            {"filler_id": None, "corruption_ids": [1, 2]},
            "corruption_ids: expected 6 token ids, as the needle has, got 2",
        ),
        ({"filler_id": None, "corruption_ids": "abcdef"}, "corruption_ids: expected token ids, got 'abcdef'"),
        ({"filler_id": 61}, r"filler_id: expected token ids of the model's vocabulary, 0..60, got 61"),
        ({"filler_id": None, "corruption_ids": [1, 1, 1, 1, 1, -1]}, "corruption_ids: expected token ids of .* got -1"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cri(build("llama"), trial(), **({"filler_id": FILLER} | arguments))


def test_the_needle_itself_is_no_corruption() -> None:
    of = trial()
    with pytest.raises(ValueError, match="corruption_ids: expected other tokens than the needle's, got the same"):
        cri(build("llama"), of, corruption_ids=of.prompt_ids[slice(*of.needle_span)])


def test_an_answer_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match=r"input_ids: expected token ids of the model's vocabulary, 0..60, got 99"):
        cri(build("llama"), trial(answer=[99]), filler_id=FILLER)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model: how much it prefers the answer is not finite"):
        cri(model, trial(), filler_id=FILLER)


def test_a_projection_that_is_not_called_is_named() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: (torch.zeros_like(kwargs["hidden_states"]), None)
    with pytest.raises(RecordingError, match=r"layer 1 \(LlamaAttention\) did not hand the outputs"):
        cri(model, trial(), filler_id=FILLER)
