"""Find the projection that makes a layer's queries, and which of its output channels make the query of which head.

Models keep queries in a projection of their own, beside a gate, or fused with keys and values, head by head, group by
group or in blocks. Nothing is known by model name: in one short forward pass every attention module runs again, its
attention function replaced by one that keeps what it is given, with the output of one of its projections set to zero
and followed by autograd from there to queries, keys and values. At zero a norm over all heads passes each channel on to
itself alone, so that a channel makes the query of a head if, and only if, its derivative is not zero.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits
from locos_fast.models.architecture import AttentionLayer, UnsupportedModelError, head_count
from locos_fast.models.attention_registry import InterfaceCall, registry

PROBE_TOKENS = 4

_found: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Any]] = weakref.WeakKeyDictionary()


class QueryProjection(NamedTuple):
    """Where a layer's queries are before norms and rotary embeddings."""

    module: nn.Module
    channels: list[list[int]]  # head -> channels of the module's output
    normed_together: bool  # whether a norm over several heads follows: the query of one changes the scale of others


def query_projections(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> dict[int, QueryProjection]:
    """Layer number -> its query projection, of these layers.

    Found once for a module, in a forward pass over a few random tokens; whoever observes or ablates the model has to be
    out of the way. Raises UnsupportedModelError, naming the module and the reason, where the channels of a head cannot
    be told apart.
    """
    unknown = [layer for layer in layers if _found.get(layer.module, (None,))[0] != _parts(layer.module)]
    if unknown:
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as hooks:
            for layer in unknown:
                hooks.callback(layer.module.register_forward_hook(_probe(layer), with_kwargs=True).remove)
            table = model.get_input_embeddings().weight
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(len(table), (1, PROBE_TOKENS), generator=generator).to(table.device)
            answer_logits(model, ids, [PROBE_TOKENS - 1])
    result = {}
    for layer in layers:
        found = _found[layer.module][1]
        if isinstance(found, str):
            raise UnsupportedModelError(
                f"layer {layer.number} ({type(layer.module).__name__}): the query of a head cannot be set, {found}"
            )
        result[layer.number] = found
    return result


def _probe(layer: AttentionLayer) -> Callable:
    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        parts = _parts(module)
        with torch.enable_grad():
            _found[module] = parts, _query_projection(_Module(layer, args, kwargs))

    return after


def _query_projection(module: _Module) -> QueryProjection | str:
    """The first of the layer's modules, in the order in which they run, whose output channels each make the query of
    one head; or why there is none."""
    heads = head_count(module.layer)
    for candidate in module.parts_that_run():
        channels = module.channels(candidate, heads)
        if channels is None:
            continue
        if isinstance(channels, str):
            return channels
        if not module.makes_all_of_the_query(candidate):
            return f"more than its {type(candidate).__name__} goes into it"
        return QueryProjection(candidate, channels, module.is_normed_together(candidate, channels))
    return "no module was found whose output channels each make the query of one head"


class _Module:
    """Runs one attention module again, with the output of one of the modules inside it replaced."""

    def __init__(self, layer: AttentionLayer, args: tuple, kwargs: dict) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.given: InterfaceCall | None = None

    def attend(self, module: nn.Module, implementation: str, given: InterfaceCall, attend: Callable) -> tuple:
        """See `attention_registry.Intervention`."""
        if self.given is None:
            self.given = given
        query, _, value = given.qkv
        return query.new_zeros(*query.shape[:1], *query.shape[1:3][::-1], value.shape[-1]), None

    def hides(self, module: nn.Module) -> None:
        """See `attention_registry.Intervention`."""

    def parts_that_run(self) -> list[nn.Module]:
        """Modules inside the attention module that return a tensor before it attends, in the order of their calls."""
        seen: list[nn.Module] = []
        with contextlib.ExitStack() as hooks:
            for part in self.layer.module.modules():
                if part not in (self.layer.module, self.layer.projection):
                    hooks.callback(part.register_forward_pre_hook(lambda part, _: seen.append(part)).remove)
            self._run()
        return seen

    def channels(self, part: nn.Module, heads: int) -> list[list[int]] | str | None:
        """The channels of each head; None if a channel is in the queries of several or a head has none, and the reason
        if keys or values are made of the same."""
        leaf, qkv = self._behind(part, lambda output: torch.zeros_like(output).requires_grad_())
        if leaf is None or not qkv[0].requires_grad or qkv[0].shape[1] != heads:
            return None
        makes = torch.stack([_made_of(qkv[0][:, head], leaf) for head in range(heads)])  # (H, W)
        if bool((makes.sum(0) > 1).any()) or not bool(makes.any(1).all()):
            return None
        for states in qkv[1:]:
            if states.requires_grad and bool((_made_of(states, leaf) & makes.any(0)).any()):
                return "keys or values are made of the same channels"
        return [row.nonzero()[:, 0].tolist() for row in makes]

    def makes_all_of_the_query(self, part: nn.Module) -> bool:
        """Whether queries are the same for other hidden states if the part returns the same."""
        _, (query, *_) = self._behind(part, torch.zeros_like)
        _, (other, *_) = self._behind(part, torch.zeros_like, change=lambda hidden: hidden.flip(1))
        return torch.equal(query, other)

    def is_normed_together(self, part: nn.Module, channels: list[list[int]]) -> bool:
        def random(output: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return torch.randn(output.shape, generator=generator).to(output)

        def without_first(output: Tensor) -> Tensor:
            return random(output).index_fill(-1, torch.tensor(channels[0], device=output.device), 0)

        _, (query, *_) = self._behind(part, random)
        _, (other, *_) = self._behind(part, without_first)
        return not torch.equal(query[:, 1:], other[:, 1:])

    def _behind(
        self, part: nn.Module, replace: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
        """What the part's output was replaced by, None if it returns no tensor, and queries, keys and values."""
        replaced: list[Tensor] = []

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, Tensor) and output.is_floating_point():
                replaced.append(replace(output.detach()))
                return replaced[-1]
            return None

        handle = part.register_forward_hook(hook)
        try:
            given = self._run(change)
        finally:
            handle.remove()
        return (replaced[0] if len(replaced) == 1 else None), given.qkv

    def _run(self, change: Callable[[Tensor], Tensor] | None = None) -> InterfaceCall:
        args, kwargs = self.args, self.kwargs
        if change is not None:
            args, kwargs = _with_hidden_states(args, kwargs, change)
        self.given = None
        with registry.intervene([self.layer.module], self):
            self.layer.module.forward(*args, **kwargs)
        if self.given is None:
            raise UnsupportedModelError(
                f"layer {self.layer.number} ({type(self.layer.module).__name__}) did not call its attention function"
            )
        return self.given


def _made_of(states: Tensor, leaf: Tensor) -> Tensor:
    """(W,) bool: the channels of `leaf` (..., W) that `states` depend on."""
    generator = torch.Generator().manual_seed(0)
    weights = (0.5 + torch.rand(states.shape, generator=generator)).to(states)
    (gradient,) = torch.autograd.grad(states, leaf, weights, retain_graph=True, allow_unused=True)
    if gradient is None:
        return torch.zeros(leaf.shape[-1], dtype=torch.bool)
    return (gradient != 0).flatten(0, -2).any(0).cpu()


def _with_hidden_states(args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict[str, Any]]:
    """The first (B, T, hidden) tensor of a call, changed."""

    def is_hidden(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point()

    for place, x in enumerate(args):
        if is_hidden(x):
            return (*args[:place], change(x), *args[place + 1 :]), kwargs
    name = next(name for name, x in kwargs.items() if is_hidden(x))
    return args, kwargs | {name: change(kwargs[name])}


def _parts(module: nn.Module) -> tuple:
    """What a finding rests on: the modules inside."""
    return tuple((id(part), type(part)) for part in module.modules())
