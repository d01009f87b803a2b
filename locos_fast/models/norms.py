"""Norms as frozen linear maps: y = weight * scale * (x - mean of x, if centred) + bias, with the scale of one forward
pass.

What a norm does is read from what it did: of the few forms in use (RMSNorm, Gemma's 1 + w, LayerNorm, norms without
weight) the one that reproduces the recorded outputs is taken, so that no class name has to be known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from locos_fast.models.architecture import UnsupportedModelError

SLACK = 4  # rounding errors of the outputs' dtype that the reproduction of a norm may differ by, relative to them
SLACK_INSIDE = 64  # and of float32, in which transformers' norms work inside, whatever the model's dtype


class FrozenNorm(NamedTuple):
    """A norm at T rows of one forward pass; pulling a direction back through it is exact for these rows."""

    weight: Tensor  # (hidden,) effective weight, 1 + w where the norm adds one
    scale: Tensor  # (T,) the factor that normalised each row
    bias: Tensor | None  # (hidden,)
    centred: bool

    def pull_back(self, direction: Tensor) -> Tensor:
        """(T, hidden) directions after the norm to directions before it."""
        direction = direction * self.weight * self.scale[:, None]
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction

    def constant(self, direction: Tensor) -> Tensor:
        """(T,) what the norm's bias adds along `direction`, whatever comes in."""
        return direction.new_zeros(len(direction)) if self.bias is None else direction @ self.bias


def freeze(module: nn.Module, inputs: Tensor, outputs: Tensor) -> FrozenNorm:
    """The frozen form of a norm that turned `inputs` into `outputs`, both (T, hidden).

    Raises UnsupportedModelError, naming the module, if no known form reproduces the outputs.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    x, y = inputs.to(dtype), outputs.to(dtype)
    given = getattr(module, "weight", None)
    weight = torch.ones_like(x[0]) if given is None else given.detach().to(x)
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().to(x)
    forms = [
        _fit(x, y, effective, bias, centred)
        for effective in ((weight,) if given is None else (weight, 1 + weight))
        for centred in (False, True)
    ]
    norm, error = min(forms, key=lambda form: form[1])
    if error > max(SLACK * torch.finfo(outputs.dtype).eps, SLACK_INSIDE * torch.finfo(torch.float32).eps):
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be pulled back: no known kind of norm reproduces its outputs "
            f"(relative error {error:.1e})"
        )
    return norm


def _fit(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, centred: bool) -> tuple[FrozenNorm, float]:
    """The scale that fits best, and the relative error that remains."""
    shaped = (x - x.mean(-1, keepdim=True) if centred else x) * weight
    target = y if bias is None else y - bias
    scale = (shaped * target).sum(-1) / shaped.square().sum(-1).clamp(min=torch.finfo(x.dtype).tiny)
    error = (target - scale[:, None] * shaped).norm() / y.norm().clamp(min=torch.finfo(x.dtype).tiny)
    return FrozenNorm(weight, scale, bias, centred), float(error)
