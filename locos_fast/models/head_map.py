"""Show that what a layer makes of its heads' outputs, on the way to its output projection, is a factor per channel.

Scores split a head's output by the keys it came from and push the parts through the output projection. Where a module
changes the output in front of it (a gate, a norm), the parts survive only if the change is a factor for each channel,
the same for every part:

    projection input = g * output,    elementwise

with g held as this forward made it, which is what "frozen" means here as for the norms of the stream. A gate is made
from other things than the outputs, and g is exactly that. The scale of an RMSNorm, over all heads or within one, is
made from the outputs; held fixed it is one number per row and head, and the parts still add up. A norm that subtracts a
mean, a bias, a difference of heads and a nonlinearity are no such factor, and the layer is refused: contributions of
whole heads would add up all the same, so completeness cannot tell.

Nothing is known by model name. In one short forward pass every attention module runs again with its attention
function's output replaced, and what then reaches the output projection is compared with what a factor would make of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits
from locos_fast.models.architecture import AttentionLayer, UnsupportedModelError, attention_layers
from locos_fast.models.attention_calls import several_calls
from locos_fast.models.attention_registry import RecordingError, registry

PROBE_TOKENS = 8
SLACK = 4  # rounding errors, relative to what reaches the projection: a gate and a norm make one or two each

# attention module -> (what was shown, why it is refused or None): shown once, not in every forward pass
_shown: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str | None]] = weakref.WeakKeyDictionary()


class HeadsSeen(NamedTuple):
    """One run of an attention module."""

    output: Tensor  # (rows, H, Dv) what its attention function returned, or was made to return
    projected: Tensor  # (rows, H * Dv) what its output projection was given


@torch.inference_mode()
def check_head_map(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise UnsupportedModelError, naming the layer, unless every layer hands its heads to its output projection as
    they are or times a factor per channel.

    input_ids: (1, N), of which the first few are shown to the model, once per model: what was shown of a module holds
    until it has other parts or hooks. Raises RecordingError where an output projection is not seen at work.
    """
    layers = attention_layers(model)
    unknown = [layer for layer in layers if _shown.get(layer.module, (None,))[0] != _parts(layer.module)]
    if unknown:
        with contextlib.ExitStack() as hooks:
            for layer in unknown:
                hooks.callback(_Experiment(layer).hook().remove)
            few = input_ids[:, :PROBE_TOKENS]
            answer_logits(model, few, [few.shape[1] - 1])
    for layer in layers:
        _, reason = _shown.get(layer.module, (None, None))
        if reason is not None:
            raise UnsupportedModelError(reason)


def not_handed_over(layer: AttentionLayer) -> RecordingError:
    """For a layer whose output projection was not seen at work after its heads."""
    return RecordingError(
        f"layer {layer.number} ({type(layer.module).__name__}) did not hand the outputs of its heads to its "
        f"{type(layer.projection).__name__}"
    )


def is_factor(before: HeadsSeen, after: HeadsSeen) -> bool:
    """Whether one factor per channel, and one more per row and head, takes `output` to `projected` in both runs."""
    output, changed = (x.output.cpu().double() for x in (before, after))
    given, expected = (x.projected.cpu().double().view(output.shape) for x in (before, after))
    factor = torch.where(output == 0, 0.0, given / output)
    seen = torch.where(output == 0, 0.0, expected)  # nothing is known of a channel that was zero
    linear = factor * changed
    size = linear.square().sum(-1, keepdim=True)
    scale = (linear * seen).sum(-1, keepdim=True) / torch.where(size == 0, 1.0, size)  # of a norm, now
    eps = max(torch.finfo(x.dtype).eps for x in (before.output, before.projected, torch.empty((), dtype=torch.float32)))
    return bool((seen - scale * linear).norm() <= SLACK * eps * seen.norm())


class _Experiment:
    """Runs one attention module again, each time with other outputs of its attention function."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer, self.parts = layer, _parts(layer.module)
        self.outputs: list[Tensor] = []  # of the attention calls of this run
        self.projected: Tensor | None = None
        self.change: Callable[[Tensor], Tensor] = torch.clone

    def hook(self) -> Any:
        return self.layer.module.register_forward_hook(self._after, with_kwargs=True)

    def observe(self, module: nn.Module, implementation: str, qkv: tuple, mask: Any, output: Tensor, _: dict) -> Tensor:
        """See `attention_registry.Observer`."""
        self.outputs.append(self.change(output))
        return self.outputs[-1]

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        with self._watched():
            reason = self._reason(lambda: module.forward(*args, **kwargs))
        _shown[module] = (self.parts, reason)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.projected = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))

        hook = self.layer.projection.register_forward_hook(keep, with_kwargs=True)
        try:
            with registry.unaltered([self.layer.module]), registry.lend([self.layer.module], self):
                yield
        finally:
            hook.remove()

    def _run(self, forward: Callable[[], Any], change: Callable[[Tensor], Tensor]) -> HeadsSeen | str:
        """What was seen, or the sentence that says why the heads cannot be followed."""
        self.change, self.projected = change, None
        self.outputs.clear()
        forward()
        if len(self.outputs) > 1:
            return str(several_calls(self.layer))
        where = f"layer {self.layer.number} ({type(self.layer.module).__name__})"
        kind = type(self.layer.projection).__name__
        if not self.outputs:
            return f"{where} did not call its attention function"
        if self.projected is None:
            raise not_handed_over(self.layer)
        if self.projected.numel() != self.outputs[0].numel():
            return f"{where} hands its {kind} something of another size than the outputs of its heads"
        output = self.outputs[0].flatten(0, 1)
        return HeadsSeen(output, self.projected.reshape(len(output), -1))

    def _reason(self, forward: Callable[[], Any]) -> str | None:
        """Why the layer is refused, or None."""
        first = self._run(forward, torch.clone)
        if isinstance(first, str):
            return first
        if not bool(first.projected.isfinite().all()):
            return None  # weights that are not finite show nothing, and are no matter of the map
        for change in (torch.zeros_like, _all_positive, _one_head_changed):
            seen = self._run(forward, change)
            if isinstance(seen, str):
                return seen
            if not is_factor(first, seen):
                return (
                    f"layer {self.layer.number}: what {type(self.layer.module).__name__} does to the outputs of its "
                    f"heads in front of its {type(self.layer.projection).__name__} is no factor per channel, so they "
                    "cannot be split by the tokens they came from"
                )
        return None


def _all_positive(output: Tensor) -> Tensor:
    """Random values of the outputs' size and one sign: what subtracts a mean cannot hide, however many the channels."""
    return (output.cpu().double().std() * (0.5 + _uniform(output))).to(output)


def _one_head_changed(output: Tensor) -> Tensor:
    """The first head times a random factor per channel."""
    changed = output.clone()
    changed[:, :, 0] *= (0.5 + _uniform(output)[:, :, 0]).to(output)
    return changed


def _uniform(like: Tensor) -> Tensor:
    """The caller's random numbers stay untouched."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _parts(module: nn.Module) -> tuple:
    """What a verdict rests on: the classes inside the module, and who hooks into them."""
    return tuple((type(m), *m._forward_pre_hooks, *m._forward_hooks) for m in module.modules())
