"""Every family: contributions add up to the model's own logit, and scores are their definition.

The definition here shares no code with the library. Attention weights and values are taken where each model's own eager
attention function returns them. Directions are gradients: the model itself is run with everything but the direct path
to the logit detached and with the norms on that path frozen, so multipliers, gates, scalars and projections are the
model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, MambaConfig, OPTConfig, PreTrainedModel

from locos_fast.causal.ablation import ablate
from locos_fast.models.architecture import (
    UnsupportedModelError,
    attention_layers,
    decoder_layers,
    head_count,
    layer_count,
)
from locos_fast.models.memory_estimate import estimate
from locos_fast.scoring.directions import NORMS
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.score import score_tokens
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import SMALL, WINDOW, Family, construct, tokens, visible_keys

IDENTITY = 1e-6  # transformers' norms and softmax compute in float32, also in a float64 model
DEFINITION = 1e-5  # of the largest magnitude
LENGTH = 27  # more than three windows of 8
ANSWER = [22, 24, 25]  # predicted by rows 21, 23 and 24
NEEDLES = {"before": (3, 6), "across": (10, 20), "inside": (17, 20)}
SCORES = ("score", "l_plus", "l_minus", "dla")
POST_NORMS = {  # what stands between the output projection and the stream
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "gemma3_vision": "post_attention_layernorm",
    "gemma4": "post_attention_layernorm",
    "gemma4_moe": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
    "olmo3": "post_attention_layernorm",
    "glm4": "post_self_attn_layernorm",
}
PROJECTIONS = ("self_attn.o_proj", "attn.c_proj", "attention.dense")
WINDOWED = [
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "llama4",
    "mixtral",
    "gemma3_vision",
    "gemma4",
    "gemma4_moe",
    "olmo3",
    "phi3",
    "cohere2",
    "smollm3",
]

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is not available")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


# --- the definition


class Attended(NamedTuple):
    """One call of a model's own attention function."""

    weights: Tensor  # (H, N, N)
    values: Tensor  # (H, N, Dv)
    output: Tensor  # (1, N, H, Dv), a leaf: the direct path to the logit starts here


class Naive(NamedTuple):
    """The definition's answer for one prompt."""

    attended: dict[int, Attended]
    directions: dict[str, dict[int, Tensor]]  # norm -> layer -> (N, H, Dv)


@contextmanager
def leaves_at_head_outputs(model: PreTrainedModel) -> Iterator[dict[int, Attended]]:
    """Spy on the eager attention function in the model's source file."""
    attended: dict[int, Attended] = {}
    files = {type(m).__module__ for m in model.modules() if "Attention" in type(m).__name__}
    files &= {name for name in files if hasattr(sys.modules[name], "eager_attention_forward")}
    with pytest.MonkeyPatch.context() as patch:
        for file in files:
            original = sys.modules[file].eager_attention_forward
            patch.setattr(sys.modules[file], "eager_attention_forward", spy(original, attended))
        yield attended


def spy(original: Callable, attended: dict[int, Attended]) -> Callable:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
        output, weights = original(module, query, key, value, *args, **kwargs)
        leaf = output.detach().requires_grad_()
        values = value[0].repeat_interleave(query.shape[1] // value.shape[1], 0)
        attended[module.layer_idx] = Attended(weights[0], values, leaf)
        return leaf, weights

    return attention


def text_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The text decoder and its layers, by the names that transformers gives them."""
    for name, module in model.named_modules():
        layers = getattr(module, "layers", getattr(module, "h", None))
        if isinstance(layers, nn.ModuleList) and "vision" not in name:
            return module, layers
    raise AssertionError("no layers")


def freeze_norm(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A hook: the same output, as a linear function of the input with what normalised it held fixed."""
    x, bias = args[0], getattr(module, "bias", None)
    if type(module).__name__.endswith("LayerNorm"):
        x = x - x.mean(-1, keepdim=True)
    bias = 0 if bias is None else bias
    return x * ((output - bias) / x).detach() + bias


def detach_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def cut(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    return tuple(map(cut, args)), {name: cut(x) for name, x in kwargs.items()}


@contextmanager
def only_the_direct_path(model: PreTrainedModel, family: str) -> Iterator[None]:
    """Gradients flow from the logit to head outputs through nothing but the stream and frozen norms."""
    owner, layers = text_layers(model)
    with ExitStack() as hooks:

        def hook(handle: Any) -> None:
            hooks.callback(handle.remove)

        for name in ("norm", "ln_f", "final_layer_norm"):
            if hasattr(owner, name):
                hook(getattr(owner, name).register_forward_hook(freeze_norm))
        for layer in layers:
            for name, child in layer.named_children():
                if name == POST_NORMS.get(family):
                    hook(child.register_forward_hook(freeze_norm))
                elif not isinstance(child, nn.Dropout):
                    hook(child.register_forward_pre_hook(detach_input, with_kwargs=True))
        yield


@contextmanager
def projected_outputs(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> what its output projection returned, without bias, still attached to the head outputs."""
    result: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for number, layer in enumerate(text_layers(model)[1]):
            for name, module in layer.named_modules():
                if name in PROJECTIONS:

                    def keep(module: nn.Module, args: tuple, output: Tensor, number: int = number) -> None:
                        result[number] = output

                    hooks.callback(module.register_forward_hook(keep).remove)
        yield result


def naive(model: PreTrainedModel, family: str, ids: Tensor) -> Naive:
    """Weights, values, and gradients of answer logits with respect to head outputs."""
    length = max(ANSWER)
    model.requires_grad_(False)
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    config.final_logit_softcapping = None  # contributions are to the logit before the cap
    rows = [position - 1 for position in ANSWER]
    try:
        with (
            leaves_at_head_outputs(model) as attended,
            only_the_direct_path(model, family),
            projected_outputs(model) as projected,
            torch.enable_grad(),
        ):
            logits = model(ids[:, :length], use_cache=False).logits
    finally:
        config.final_logit_softcapping = softcap
    numbers = sorted(attended)
    leaves = [attended[number].output for number in numbers]
    answer_logits = logits[0, rows, ids[0, ANSWER]].sum()
    along_answer = [
        (projected[number].view(1, length, -1)[0, rows] * model.lm_head.weight[ids[0, ANSWER]]).sum()
        for number in numbers
    ]
    frozen = torch.autograd.grad(answer_logits, leaves, retain_graph=True)
    raw = [
        torch.autograd.grad(value, leaf, retain_graph=True)[0] for value, leaf in zip(along_answer, leaves, strict=True)
    ]
    of_norm = {"none": raw, "frozen": frozen}
    return Naive(attended, {norm: {n: w[0] for n, w in zip(numbers, of_norm[norm], strict=True)} for norm in NORMS})


@torch.no_grad()
def naive_scores(truth: Naive, norm: str, span: tuple[int, int], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Means over the rows that see the needle (DLA: over all rows), position by position.

    shape: (layers, heads).
    """
    result = {name: np.full(shape, np.nan) for name in SCORES}
    for layer, (weights, values, _) in truth.attended.items():
        rows: dict[str, list[Tensor]] = {"l_plus": [], "l_minus": [], "dla": []}
        for position in ANSWER:
            alpha, w = weights[:, position - 1], truth.directions[norm][layer][position - 1]  # (H, N), (H, Dv)
            phi = alpha * torch.einsum("hd,hnd->hn", w, values)
            seen = alpha[0] > 0
            needle = torch.zeros_like(seen)
            needle[span[0] : span[1]] = True
            rows["dla"].append(phi.sum(-1))
            n, others = int((needle & seen).sum()), int((~needle & seen).sum())
            if n:
                rows["l_plus"].append(phi[:, needle].sum(-1))
                rows["l_minus"].append(n / max(others, 1) * phi[:, ~needle].sum(-1))
        for name, values_of_rows in rows.items():
            if values_of_rows:
                result[name][layer] = torch.stack(values_of_rows).mean(0).numpy()
        result["score"][layer] = result["l_plus"][layer] - result["l_minus"][layer]
    return result


def distance(scores: HeadScores, expected: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest magnitude of that score; NaN in other places is infinite."""
    worst = 0.0
    for name in SCORES:
        actual = getattr(scores, name)
        if not np.array_equal(np.isnan(actual), np.isnan(expected[name])):
            return float("inf")
        largest = np.nanmax(np.abs(expected[name]), initial=0.0)
        error = np.nanmax(np.abs(actual - expected[name]), initial=0.0)
        worst = max(worst, float(error / largest) if largest else float(error))
    return worst


# --- all families


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_and_scores_are_the_definition(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    truth = naive(model, family, ids)
    scores = {norm: score_tokens(model, ids, NEEDLES["across"], ANSWER, norm=norm, verify=True) for norm in NORMS}
    shape = scores["none"].score.shape
    off = {norm: distance(scores[norm], naive_scores(truth, norm, NEEDLES["across"], shape)) for norm in NORMS}
    completeness = scores["frozen"].meta["completeness"]
    worst_layer = max(completeness["layers"].values())
    print(
        f"\n{family:20s} identity {completeness['overall']:.1e}  worst layer {worst_layer:.1e}  "
        f"from the definition: none {off['none']:.1e}  frozen {off['frozen']:.1e}",
        end="",
    )
    assert set(completeness["layers"]) == {str(number) for number in truth.attended}
    assert completeness["overall"] <= IDENTITY
    assert worst_layer <= IDENTITY
    assert off["none"] <= DEFINITION
    assert off["frozen"] <= DEFINITION


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_scores_are_those_of_eager(family: str) -> None:
    if "sdpa" not in FAMILIES[family].implementations:
        pytest.skip("this family has no sdpa")
    ids = tokens(1, LENGTH)
    eager, sdpa = (
        score_tokens(build(family, attention), ids, NEEDLES["across"], ANSWER, norm="frozen", verify=True)
        for attention in ("eager", "sdpa")
    )
    assert distance(sdpa, {name: getattr(eager, name) for name in SCORES}) <= DEFINITION


# --- windows and chunks


@pytest.mark.parametrize("family", WINDOWED)
def test_the_needle_before_across_and_inside_a_window(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    truth = naive(model, family, ids)
    assert any(
        bool((attended.weights[0, -1, : max(ANSWER) - WINDOW] == 0).all()) for attended in truth.attended.values()
    )
    for place, span in NEEDLES.items():
        scores = score_tokens(model, ids, span, ANSWER, verify=True)
        assert distance(scores, naive_scores(truth, "none", span, scores.score.shape)) <= DEFINITION, place
        for layer in truth.attended:
            rows = visible_keys(model, layer, LENGTH)[[position - 1 for position in ANSWER]]
            blind = not bool(rows[:, span[0] : span[1]].any())
            assert np.isnan(scores.score[layer]).all() == blind
            assert not np.isnan(scores.dla[layer]).any()


def test_every_family_with_a_window_is_among_them() -> None:
    for family in set(FAMILIES) - set(WINDOWED):
        model = build(family)
        for layer in attention_layers(model):
            assert bool(visible_keys(model, layer.number, LENGTH)[-1].all()), family


def test_linear_layers_are_not_scored() -> None:
    scores = score_tokens(build("qwen3_next"), tokens(1, LENGTH), NEEDLES["inside"], ANSWER, norm="frozen")
    for name in (*SCORES, "attention_spatial", "wu"):
        assert np.isnan(getattr(scores, name)).all(-1).tolist() == [False, True, False]


# --- the residual stream in low precision, heads by number, memory


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_in_bfloat16_as_far_as_it_goes(family: str) -> None:
    """A stream of a dozen writes, each rounded once or twice, half an ulp at a time."""
    model = build(family, dtype=torch.bfloat16)
    scores = score_tokens(model, tokens(1, LENGTH), NEEDLES["across"], ANSWER, norm="frozen")
    completeness = scores.meta["completeness"]
    assert max(completeness["overall"], *completeness["layers"].values()) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_has_a_number(family: str) -> None:
    model = build(family)
    layers = attention_layers(model)
    assert layer_count(model) == len(decoder_layers(model)) == len(text_layers(model)[1])
    every_head = [(layer.number, head) for layer in layers for head in range(head_count(layer))]
    scores = score_tokens(model, tokens(1, LENGTH), NEEDLES["inside"], ANSWER)
    assert every_head == [tuple(head) for head in np.argwhere(~np.isnan(scores.dla)).tolist()]
    silent = []
    with ablate(model, every_head), ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hook = layer.projection.register_forward_hook(lambda _, args, output: silent.append(not args[0].any()))
            hooks.callback(hook.remove)
        model(tokens(1, LENGTH))
    assert silent == [True] * len(layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_estimated(family: str, attention: str) -> None:
    model = build(family, dtype=torch.bfloat16)
    needed = estimate(model.config, 100, torch.bfloat16, attention)
    assert needed.weights == sum(parameter.numel() * 2 for parameter in model.parameters())
    assert needed.activations > 0


# --- quantised and adapted output projections


class Int8Projection(nn.Module):
    """Weight-only quantised: integers, a scale per output, and nothing to read but its forward."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self.register_buffer("scales", weight.abs().amax(-1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scales).round().to(torch.int8))
        self.offset = bias

    def plain(self) -> nn.Linear:
        return linear(self.codes * self.scales, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scales, self.offset)


class AdaptedProjection(nn.Module):
    """A low-rank adapter, which shows the weight and bias of its base as PEFT's do."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.base, self.in_features = linear(weight, bias), weight.shape[1]
        self.down, self.up = nn.Linear(weight.shape[1], 3, bias=False), nn.Linear(3, weight.shape[0])
        self.to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def plain(self) -> nn.Linear:
        bias = self.up.bias if self.bias is None else self.bias + self.up.bias
        return linear(self.weight + self.up.weight @ self.down.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    shape = weight.T.shape
    module = nn.utils.skip_init(nn.Linear, *shape, bias=bias is not None, dtype=weight.dtype)  # no random numbers
    module.load_state_dict({"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()}))
    return module


def replace_projections(
    model: PreTrainedModel, kind: type[Int8Projection] | type[AdaptedProjection], *, plain: bool
) -> None:
    for layer in attention_layers(model):
        weight = layer.projection.weight.detach()
        weight = weight if isinstance(layer.projection, nn.Linear) else weight.T  # Conv1D
        name = next(name for name, child in layer.module.named_children() if child is layer.projection)
        odd = kind(weight, layer.projection.bias)
        setattr(layer.module, name, odd.plain() if plain else odd)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [Int8Projection, AdaptedProjection])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "gpt_oss", "qwen3_next", "cohere2"])
def test_a_projection_that_is_not_its_weight_equals_its_plain_twin(
    family: str, kind: type[Int8Projection] | type[AdaptedProjection], norm: str
) -> None:
    ids, scores = tokens(1, LENGTH), []
    for plain in (False, True):
        model = build(family)
        torch.manual_seed(1)  # the same adapter in both
        replace_projections(model, kind, plain=plain)
        scores.append(score_tokens(model, ids, NEEDLES["across"], ANSWER, norm=norm, verify=True))
    odd, twin = scores
    assert distance(odd, {name: getattr(twin, name) for name in SCORES}) <= DEFINITION
    if norm == "frozen":
        assert odd.meta["completeness"]["overall"] <= IDENTITY
        assert max(odd.meta["completeness"]["layers"].values()) <= IDENTITY


# --- what cannot be made exact is refused


def refused(model: nn.Module, match: str, norm: str = "frozen") -> None:
    with pytest.raises(UnsupportedModelError, match=match) as error:
        score_tokens(model, tokens(1, LENGTH), NEEDLES["inside"], ANSWER, norm=norm)
    assert "\n" not in str(error.value)


class Squash(nn.Module):
    """No norm: what it does to a row is no multiple of the row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_vision"])
def test_a_final_norm_that_cannot_be_pulled_back_is_refused(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    text_layers(model)[0].norm = Squash()
    refused(model, "Squash cannot be pulled back")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_after_attention_that_cannot_be_pulled_back_is_refused(dtype: torch.dtype) -> None:
    model = build("gemma2", dtype=dtype)
    model.model.layers[1].post_attention_layernorm = Squash()
    refused(model, "Squash cannot be pulled back")


def test_attention_that_changes_what_its_projection_returned_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda _, args, output: (1.01 * output[0], *output[1:]))
    refused(model, "layer 1: the output of LlamaAttention is not what its Linear returned")


def test_a_multiplier_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locos_fast.models.residual_stream._multipliers", lambda layer: [1.0])
    refused(build("granite"), r"layer 2 \(GraniteDecoderLayer\): cannot follow the output of GraniteAttention")


def test_a_final_multiplier_that_is_not_found_is_refused() -> None:
    model = build("granite")
    model.model.norm.register_forward_hook(lambda _, args, output: 1.5 * output)
    scores = score_tokens(model, tokens(1, LENGTH), NEEDLES["inside"], ANSWER, norm="frozen")
    assert scores.meta["completeness"]["overall"] <= IDENTITY  # the hook is part of what the norm did
    model.lm_head.register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    refused(model, "GraniteForCausalLM: cannot follow the residual stream from the last layer to the unembedding")


def test_a_stream_that_is_normalised_between_layers_is_refused() -> None:
    """As in OPT-350m, where it is; the other OPT models add to it only."""
    sizes = {"vocab_size": SMALL["vocab_size"], "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 40}
    for before in (True, False):
        config = OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, do_layer_norm_before=before)
        model = construct(Family(OPTConfig, config.to_dict()), "eager", dtype=torch.float64)
        if before:
            scores = score_tokens(model, tokens(1, LENGTH), NEEDLES["inside"], ANSWER, norm="frozen")
            assert scores.meta["completeness"]["overall"] <= IDENTITY
        else:
            refused(model, r"layer 1 \(OPTDecoderLayer\) changes the residual stream")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_stream_that_is_rescaled_is_refused(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    model.model.layers[1].register_forward_hook(lambda _, args, output: 0.7 * output, prepend=True)
    refused(model, r"layer 1 \(")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "family, place", [("gpt2", "drop"), ("gpt_neox", "post_mlp_dropout"), ("phi3", "resid_attn_dropout")]
)
def test_training_mode_with_dropout_is_refused(family: str, place: str, norm: str) -> None:
    model = build(family)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1 if name.endswith(place) else 0.0
    score_tokens(model, tokens(1, LENGTH), NEEDLES["inside"], ANSWER, norm=norm)
    refused(model.train(), rf"is in training mode and \S*{place} applies dropout; call model.eval\(\)", norm)


class PeftModel(nn.Module):
    """Passes on whatever it is asked, as PEFT's wrapper does."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


@pytest.mark.parametrize("norm", NORMS)
def test_wrapped_and_compiled_models_are_refused(norm: str) -> None:
    refused(PeftModel(build("llama")), r"PeftModel is no transformers model; .*get_base_model\(\)", norm)
    refused(torch.compile(build("llama")), "LlamaForCausalLM is compiled, which cannot be recorded", norm)


@pytest.mark.parametrize("norm", NORMS)
def test_falcon_and_mamba_are_refused(norm: str) -> None:
    sizes = {"vocab_size": SMALL["vocab_size"], "hidden_size": 32, "num_hidden_layers": 2}
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**sizes, num_attention_heads=4)).eval()
    refused(falcon, "FalconForCausalLM cannot be recorded: FalconAttention computes attention itself", norm)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**sizes, state_size=8)).eval()
    refused(mamba, "MambaForCausalLM has no softmax attention layers", norm)
