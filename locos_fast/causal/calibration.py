"""What heads ask and give on calibration prompts: means, and single tokens to resample from.

All of it is of the intact model, whatever is ablated or recorded around the measurement. A mean is over all tokens of
all prompts, each counting once, summed in float64 prompt by prompt: nothing is kept but the sums.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.causal.intact import intact
from locos_fast.models.answer_pass import answer_logits
from locos_fast.models.architecture import AttentionLayer, UnsupportedModelError, attention_layers, head_count
from locos_fast.models.head_map import not_handed_over
from locos_fast.models.query_channels import query_projections
from locos_fast.models.token_chunks import token_chunks
from locos_fast.scoring.token_ids import check_token_ids

Calibration = Sequence[Tensor | Sequence[int]]
"""(1, N) token ids, or lists of ids; prompts may differ in length."""

CALIBRATED = ("output-mean", "output-resample", "query-mean")  # modes of `ablate`
DONORS = 1024  # tokens that outputs are kept of; with fewer in the prompts, all of them
DRAWN_AT_ONCE = 1024  # slots


class Donors(NamedTuple):
    """Head outputs at single tokens of the calibration prompts, drawn from all of them alike, without replacement."""

    outputs: dict[int, Tensor]  # layer -> (donors, heads * Dv) in the model's dtype

    def drawn(self, slots: range, seed: int) -> Tensor:
        """(slots,) int64: the donor of each slot, with replacement; a slot's is the same in every forward pass, layer
        and row."""
        count = len(next(iter(self.outputs.values())))
        blocks = range(slots.start // DRAWN_AT_ONCE, (slots.stop - 1) // DRAWN_AT_ONCE + 1)
        drawn = torch.cat([_draws(seed, block, count) for block in blocks])
        return drawn[slots.start - blocks.start * DRAWN_AT_ONCE :][: len(slots)]


@functools.lru_cache(maxsize=256)
def _draws(seed: int, block: int, count: int) -> Tensor:
    generator = random.Random(f"{seed} {block}")
    return torch.tensor([generator.randrange(count) for _ in range(DRAWN_AT_ONCE)])


@dataclass(frozen=True)
class CalibratedMeans:
    """What modes of `ablate` need of calibration prompts; made by `of`, for any number of ablations of one model."""

    outputs: dict[int, Tensor]  # layer -> (heads * Dv,) float64: the mean of what its output projection is given
    queries: dict[int, Tensor]  # layer -> (width,) float64: the mean of what its query projection returns
    donors: Donors
    prompts: tuple[tuple[int, ...], ...]
    may_overlap: bool
    refused: str | None  # why there are no queries
    _model: weakref.ref[PreTrainedModel] = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: Calibration, *, may_overlap: bool = False) -> CalibratedMeans:
        """Run the model over the prompts, (1, N) token ids each, and keep what all modes need of all heads.

        may_overlap: whether a prompt may be evaluated as well; `ablate` warns otherwise when it sees that.
        Memory: a mean per channel, and the head outputs at up to `DONORS` tokens.
        Raises ValueError for no prompts, for what are no token ids of the model, and for results that are not finite.
        """
        return _measured(model, prompts, attention_layers(model), CALIBRATED, may_overlap)

    @classmethod
    def needed(
        cls, model: PreTrainedModel, calibration: Calibration | CalibratedMeans | None, mode: str, layers: list[int]
    ) -> CalibratedMeans:
        """The calibration of one ablation: measured before, or now and of its mode and layers only."""
        if calibration is None:
            raise ValueError(f"calibration: expected prompts or CalibratedMeans for mode {mode!r}, got None")
        if isinstance(calibration, CalibratedMeans):
            means = calibration
        else:
            chosen = [layer for layer in attention_layers(model) if layer.number in layers]
            means = _measured(model, calibration, chosen, (mode,), False)
        if means._model() is not model:
            raise ValueError("calibration: expected means of this model, got those of another")
        if mode == "query-mean" and means.refused is not None:
            raise UnsupportedModelError(means.refused)
        return means

    def warn_if_evaluated(self, ids: Tensor) -> bool:
        """Whether a row of (B, N) token ids begins with one of the prompts, which is said in a warning."""
        if self.may_overlap:
            return False
        rows = [tuple(row) for row in ids.tolist()]
        seen = any(row[: len(prompt)] == prompt for row in rows for prompt in self.prompts)
        if seen:
            warnings.warn(
                "calibration: a prompt that is evaluated is one of the calibration prompts, so that the means know its "
                "needle; take others, or CalibratedMeans.of(..., may_overlap=True) if this is meant",
                stacklevel=2,
            )
        return seen


def _measured(
    model: PreTrainedModel,
    prompts: Calibration,
    layers: list[AttentionLayer],
    modes: Sequence[str],
    may_overlap: bool,
) -> CalibratedMeans:
    """What some of the modes need of some layers."""
    ids = _checked(model, prompts)
    total = sum(prompt.shape[1] for prompt in ids)
    donors = random.Random(0).sample(range(total), min(total, DONORS)) if "output-resample" in modes else []
    sums = _Sums("output-mean" in modes, torch.tensor(sorted(donors), dtype=torch.int64))
    refused = None
    with intact(model), contextlib.ExitStack() as hooks:
        if "query-mean" in modes:
            try:
                for number, found in query_projections(model, layers).items():
                    hooks.callback(found.module.register_forward_hook(sums.query_hook(number)).remove)
            except UnsupportedModelError as error:
                refused = str(error)
        for layer in layers if modes != ("query-mean",) else ():
            hook = layer.projection.register_forward_pre_hook(sums.output_hook(layer), with_kwargs=True)
            hooks.callback(hook.remove)
        sums.run(model, ids)
    return CalibratedMeans(
        {number: x / total for number, x in sums.outputs.items()},
        {number: x / total for number, x in sums.queries.items()},
        Donors({number: torch.cat(parts) for number, parts in sums.donors.items()}),
        tuple(tuple(prompt[0].tolist()) for prompt in ids),
        may_overlap,
        refused,
        weakref.ref(model),
    )


def _checked(model: PreTrainedModel, prompts: Calibration) -> list[Tensor]:
    """(1, N) int64 each, on the CPU."""
    wanted = "calibration: expected a sequence of (1, N) token ids"
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ValueError(f"{wanted}, got {prompts!r}")
    checked = []
    for prompt in prompts:
        try:
            ids = torch.as_tensor(prompt, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{wanted}, got {prompt!r} in it") from error
        ids = ids[None] if ids.ndim == 1 else ids
        whole = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
        if not whole or ids.ndim != 2 or len(ids) != 1 or not ids.numel():
            raise ValueError(f"{wanted}, got one of shape {tuple(ids.shape)} and {ids.dtype}")
        ids = ids.to(torch.int64)
        try:
            check_token_ids(model, ids, [])
        except ValueError as error:
            raise ValueError(str(error).replace("input_ids", "calibration", 1)) from error
        checked.append(ids)
    if not checked:
        raise ValueError("calibration: expected at least one prompt, got none")
    return checked


class _Sums:
    """Sums over the tokens of one prompt after another."""

    def __init__(self, means: bool, chosen: Tensor) -> None:
        self.means, self.chosen = means, chosen  # whether outputs are summed, and the tokens that are donors
        self.before, self.tokens = 0, 0  # tokens of the prompts before, and of this one
        self.outputs: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.donors: dict[int, list[Tensor]] = {}

    def run(self, model: PreTrainedModel, prompts: list[Tensor]) -> None:
        device = model.get_input_embeddings().weight.device
        for prompt in prompts:
            self.tokens = prompt.shape[1]
            with torch.inference_mode(), token_chunks(model):
                answer_logits(model, prompt.to(device), [self.tokens - 1])
            self.before += self.tokens

    def output_hook(self, layer: AttentionLayer) -> Callable:
        def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if given.numel() != self.tokens * given.shape[-1] or given.shape[-1] % head_count(layer):
                raise not_handed_over(layer)
            outputs = given.reshape(self.tokens, -1)
            if self.means:
                self._add(self.outputs, layer.number, outputs)
            if len(self.chosen):
                here = (self.chosen >= self.before) & (self.chosen < self.before + self.tokens)
                own = (self.chosen[here] - self.before).to(outputs.device)
                self.donors.setdefault(layer.number, []).append(outputs[own])

        return pre_hook

    def query_hook(self, number: int) -> Callable:
        return lambda module, args, output: self._add(self.queries, number, output.reshape(-1, output.shape[-1]))

    def _add(self, sums: dict[int, Tensor], number: int, x: Tensor) -> None:
        """x: (tokens, width)."""
        if number not in sums:
            with torch.inference_mode(False):
                sums[number] = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
        sums[number] += x.sum(0, dtype=torch.float64)
