"""A decoder with grouped heads, rotary embeddings and windows written out in float64, head by head, with a place to
change what a head asks, sees and gives.

It is the tiny "llama" or "mistral" of `tiny_models`, whose own norms work in float32: `norms_in_double` mends that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from tests.oracles.tiny_models import visible_keys

HEADS, LAYERS = 4, 3

Head = tuple[int, int]


class Change(NamedTuple):
    """What is done to one head: of its query before the rotary embedding (N, D), of the keys that its rows see (N, N)
    bool, of its output (N, D)."""

    query: Callable[[Head, Tensor], Tensor] = lambda _, x: x
    seen: Callable[[Head, Tensor], Tensor] = lambda _, x: x
    output: Callable[[Head, Tensor], Tensor] = lambda _, x: x


class Run(NamedTuple):
    """One prompt."""

    logits: Tensor  # (N, V)
    queries: dict[Head, Tensor]  # (N, D) as projected
    outputs: dict[Head, Tensor]  # (N, D)


def norm64(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def norms_in_double(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    """The model's norms in float64, until the test is over."""
    patch.setattr(type(model.model.norm), "forward", norm64)


@torch.no_grad()
def written_out(model: PreTrainedModel, ids: Tensor, changes: tuple[Change, ...] = ()) -> Run:
    """(1, N) ids."""
    x = model.model.embed_tokens.weight[ids[0]]
    queries, outputs = {}, {}
    for number, layer in enumerate(model.model.layers):
        normed = norm64(layer.input_layernorm, x)
        for head in ((number, h) for h in range(HEADS)):
            queries[head], outputs[head] = _attend(model, head, normed, changes)
        concatenated = torch.cat([outputs[number, h] for h in range(HEADS)], -1)
        x = x + linear(concatenated, layer.self_attn.o_proj.weight)
        y, mlp = norm64(layer.post_attention_layernorm, x), layer.mlp
        gated = silu(linear(y, mlp.gate_proj.weight)) * linear(y, mlp.up_proj.weight)
        x = x + linear(gated, mlp.down_proj.weight)
    return Run(linear(norm64(model.model.norm, x), model.lm_head.weight), queries, outputs)


def _attend(model: PreTrainedModel, head: Head, x: Tensor, changes: tuple[Change, ...]) -> tuple[Tensor, Tensor]:
    number, h = head
    attention, n = model.model.layers[number].self_attn, len(x)
    dim, group = attention.head_dim, HEADS // 2
    own, of_group = slice(h * dim, (h + 1) * dim), slice(h // group * dim, (h // group + 1) * dim)
    cos, sin = (part[0] for part in model.model.rotary_emb(x[None], torch.arange(n)[None]))  # in float32, as it is

    def rotated(states: Tensor) -> Tensor:
        return states * cos + torch.cat([-states[:, dim // 2 :], states[:, : dim // 2]], -1) * sin

    projected = query = linear(x, attention.q_proj.weight[own])
    seen = visible_keys(model, number, n) if model.config.model_type == "mistral" else torch.ones(n, n).tril().bool()
    for change in changes:
        query, seen = change.query(head, query), change.seen(head, seen)
    scores = rotated(query) @ rotated(linear(x, attention.k_proj.weight[of_group])).T / dim**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)  # a row that sees nothing gives 0
    output = weights @ linear(x, attention.v_proj.weight[of_group])
    for change in changes:
        output = change.output(head, output)
    return projected, output
