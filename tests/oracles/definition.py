"""What scores are, computed in a way that shares no code with the library.

Attention weights and values are taken where each model's own eager attention function returns them. Directions are
gradients: the model itself is run with everything but the direct path to the logit detached and with the norms on that
path frozen, so multipliers, gates, scalars and projections are the model's own.
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
from transformers import PreTrainedModel

from locos_fast.scoring.directions import NORMS
from locos_fast.scoring.head_scores import HeadScores

LENGTH = 27  # more than three windows of 8
ANSWER = [22, 24, 25]  # predicted by rows 21, 23 and 24
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
    "Afmoe": "post_attention_layernorm",
    "Exaone4": "post_attention_layernorm",
    "FlexOlmo": "post_attention_layernorm",
}
INNER_NORMS = {"BitNet": "attn_sub_norm"}  # and between the heads and their output projection
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm", "layer_norm")
PROJECTIONS = (
    *("self_attn.o_proj", "attn.c_proj", "attention.dense"),
    *("self_attn.out_proj", "attn.out_proj", "self_attn.dense"),
)


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
    if "LayerNorm" in type(module).__name__:
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

        for name in FINAL_NORMS:
            if hasattr(owner, name):
                hook(getattr(owner, name).register_forward_hook(freeze_norm))
        for layer in layers:
            for name, inner in layer.named_modules():
                if name.split(".")[-1] == INNER_NORMS.get(family):
                    hook(inner.register_forward_hook(freeze_norm))
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
        (projected[number].view(1, length, -1)[0, rows] * model.get_output_embeddings().weight[ids[0, ANSWER]]).sum()
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
