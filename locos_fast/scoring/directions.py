"""From target tokens to directions: d_y in the residual stream, w = W_O^T d_y in each head's output space.

norm="none", the score as published (LOCOS, arXiv 2607.01002): d_y is the raw row of the unembedding, no norm is folded
in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from locos_fast.models.architecture import UnsupportedModelError, unembedding
from locos_fast.ops.exact import exact

PARTS = 3  # half-precision values that hold a float32 to 2^-24 of the largest in its row
BLOCK = 1024  # rows of a weight that are held in float32 at a time


Norm = Literal["none", "frozen"]
"""The unit of scores: raw unembedding rows as published, or true logit units with this forward pass's scales."""
NORMS: tuple[Norm, ...] = get_args(Norm)


def check_norm(norm: str) -> Norm:
    """`norm`, which is one of the modes. Raises ValueError if it is not."""
    for known in NORMS:
        if norm == known:
            return known
    raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")


def unit_of(norm: str | None) -> str:
    """What to call a score of this mode in tables and pictures: raw dot products are not in the units of a logit."""
    return "logits" if norm == "frozen" else "dot products with raw unembedding rows"


class Target(NamedTuple):
    """What heads are scored toward: each answer token's logit, or its difference to something."""

    token_ids: Tensor  # (T,)
    contrast: str | Tensor | None = None  # "mean" of the vocabulary, or (T,) other tokens

    @classmethod
    def of(cls, token_ids: Tensor, contrast: str | Sequence[int] | None) -> Target:
        """Raises ValueError for a contrast that is neither "mean" nor one token per answer token."""
        if contrast is None or contrast == "mean":
            return cls(token_ids, contrast)
        if isinstance(contrast, str) or len(contrast) != len(token_ids):
            raise ValueError(f'contrast: expected "mean" or {len(token_ids)} token ids, got {contrast!r}')
        return cls(token_ids, torch.tensor(list(contrast), device=token_ids.device))

    def instead(self, token_ids: Sequence[int]) -> Target:
        """Toward other tokens in the places of these; where there are fewer, toward these in the remaining places."""
        others = torch.tensor(list(token_ids)[: len(self.token_ids)], device=self.token_ids.device)
        return self._replace(token_ids=torch.cat([others, self.token_ids[len(others) :]]))

    @classmethod
    def joined(cls, targets: Sequence[Target]) -> Target:
        """One behind the other; all have the same kind of contrast."""
        if len(targets) == 1:
            return targets[0]
        contrasts = [target.contrast for target in targets]
        together = [contrast for contrast in contrasts if isinstance(contrast, Tensor)]
        contrast = torch.cat(together) if together else contrasts[0]
        return cls(torch.cat([target.token_ids for target in targets]), contrast)

    def of_logits(self, logits: Tensor) -> Tensor:
        """(T,) the target's value, from (T, V) logits of the answer rows or one (V,) vector for all of them."""
        table = logits.expand(len(self.token_ids), -1)
        value = table.gather(1, self.token_ids.to(table.device)[:, None])[:, 0]
        if isinstance(self.contrast, Tensor):
            return value - table.gather(1, self.contrast.to(table.device)[:, None])[:, 0]
        return value if self.contrast is None else value - table.mean(-1)


def token_directions(model: PreTrainedModel, target: Target) -> Tensor:
    """d_y (T, hidden): the unembedding row of each target token, less its contrast's.

    float32; float64 for float64 models.
    """
    module = unembedding(model)
    weight = getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise UnsupportedModelError(f"{type(module).__name__} keeps no floating-point unembedding rows to read")
    weight = weight.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = weight[target.token_ids.to(weight.device)].to(dtype)
    if isinstance(target.contrast, Tensor):
        return rows - weight[target.contrast.to(weight.device)].to(dtype)
    return rows if target.contrast is None else rows - _mean_row(weight, dtype)


def _mean_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean over the vocabulary; a CPU would convert the whole weight first, a GPU converts as it adds up."""
    if weight.dtype == dtype or weight.is_cuda:
        return weight.mean(0, dtype=dtype)
    return torch.stack([block.sum(0, dtype=dtype) for block in weight.split(BLOCK)]).sum(0) / len(weight)


@exact()
def pull_back(projection: nn.Module, direction: Tensor) -> Tensor:
    """W^T d for the linear map of `projection` (its bias belongs to no head): (T, hidden) -> (T, heads * Dv).

    Linear and Conv1D weights are read in blocks, without a float32 copy; any other module (quantised, adapted) is
    pushed through with basis vectors, which needs nothing but its forward.
    """
    weight = projection.weight if type(projection) in (nn.Linear, Conv1D) else None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return _push_basis(projection, direction)
    weight = weight.detach()
    return _product(direction, weight if type(projection) is nn.Linear else weight.mT)


def head_directions(
    projection: nn.Module, direction: Tensor, output: Tensor, projected: Tensor
) -> tuple[Tensor, Tensor]:
    """w (T, H, Dv), with the gate folded in, and each head's contribution (T, H).

    output: (T, H, Dv) head outputs as recorded. projected: (T, H * Dv) what the output projection was given; where it
    is not the recorded output, a factor per channel stands between (a gate, a norm with its scale frozen), and joins w.
    That it is one is shown by `models.head_map.check_head_map`; DLA alone would be right without.
    """
    w = pull_back(projection, direction).view(output.shape).to(direction)
    given = projected.view(output.shape).to(direction)
    contributions = (w * given).sum(-1)
    output = output.to(direction)
    # no question to the device whether there is a gate at all: it would wait
    gate = torch.where(given == output, 1.0, torch.where(output == 0, 0.0, given / output))
    return w * gate, contributions


@exact()
def bias_of(projection: nn.Module, width: int, like: Tensor) -> Tensor:
    """(hidden,) what the projection gives for zero input, in the dtype of `like`."""
    if type(projection) in (nn.Linear, Conv1D):
        bias = projection.bias
        return bias.to(like) if isinstance(bias, Tensor) else like.new_zeros(like.shape[-1])
    floating = (w for w in (*projection.parameters(), *projection.buffers()) if w.is_floating_point())
    reference = next(floating, like)
    return projection(reference.new_zeros((1, width)))[0].to(like)


def _product(direction: Tensor, weight: Tensor) -> Tensor:
    """direction @ weight in the direction's dtype; weight is (hidden, heads * Dv) in any floating dtype.

    The weight is never copied in that dtype: on NVIDIA GPUs the direction is taken apart instead, elsewhere the weight
    is converted in blocks.
    """
    direction = direction.to(weight.device)
    if weight.dtype == direction.dtype:
        return direction @ weight
    if _has_wide_product(weight):
        parts = torch.mm(torch.cat(in_parts(direction, weight.dtype)), weight, out_dtype=torch.float32)
        largest = row_scale(direction)
        return parts.unflatten(0, (PARTS, -1)).sum(0) * largest
    result = direction.new_zeros((direction.shape[0], weight.shape[1]))
    for start in range(0, weight.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        result += direction[:, block] @ weight[block].to(direction.dtype)
    return result


def in_parts(direction: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """float32 rows, scaled to 1 by `row_scale`, as `PARTS` rows of a half-precision dtype that add up to them."""
    rest, parts = direction / row_scale(direction), []
    for _ in range(PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return parts


def row_scale(direction: Tensor) -> Tensor:
    """(T, 1) largest magnitude of each row, 1 where it is zero."""
    largest = direction.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _has_wide_product(weight: Tensor) -> bool:
    """Whether PyTorch multiplies half-precision matrices into float32: on NVIDIA GPUs."""
    return weight.is_cuda and weight.element_size() == 2 and torch.version.hip is None


def _push_basis(projection: nn.Module, direction: Tensor) -> Tensor:
    weights = [*projection.parameters(), *projection.buffers()]
    reference = next((w for w in weights if w.is_floating_point()), None)
    width = int(getattr(projection, "in_features", 0))
    if width == 0:
        raise UnsupportedModelError(f"cannot tell the input width of output projection {type(projection).__name__}")
    # a quantised projection may hold nothing but integers, and then takes what it is given
    dtype = direction.dtype if reference is None else reference.dtype
    device = weights[0].device if weights else direction.device
    bias = projection(torch.zeros((1, width), dtype=dtype, device=device)).to(direction.dtype)
    columns = []
    for start in range(0, width, BLOCK):
        basis = torch.eye(width, dtype=dtype, device=device)[start : start + BLOCK]
        columns.append(direction.to(device) @ (projection(basis).to(direction.dtype) - bias).mT)
    return torch.cat(columns, dim=-1)
