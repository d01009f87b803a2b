"""ablate(): take heads out while a model runs, to see whether they are the cause of what it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast import ops
from locos_fast.causal.ablation_modes import constant, replace_outputs, replace_queries, resampled, zero
from locos_fast.causal.calibration import CALIBRATED, CalibratedMeans, Calibration
from locos_fast.causal.chosen_heads import Head, Heads, chosen_heads
from locos_fast.causal.intact import unless_intact
from locos_fast.causal.needle_knockout import hide_needle
from locos_fast.models.architecture import decoder
from locos_fast.models.forward_inputs import read_forward, read_ids
from locos_fast.ops.arguments import checked_spans

__all__ = ["MODES", "CalibratedMeans", "Head", "Mode", "ablate"]

Mode = Literal["output-zero", "output-mean", "output-resample", "query-zero", "query-mean", "needle-knockout"]
MODES: tuple[Mode, ...] = get_args(Mode)


@contextlib.contextmanager
def ablate(
    model: PreTrainedModel,
    heads: Heads,
    *,
    mode: str = "output-zero",
    calibration: Calibration | CalibratedMeans | None = None,
    needle: tuple[int, int] | ops.Spans | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Ablate `heads`, [(layer, head)], in every forward pass inside the context.

    A head's output is its slice of what the output projection is given, behind a gate or a norm; the projection's bias
    stays. Its query is its channels of what the query projection returns, in front of norms and rotary embeddings.

    "output-zero"      the output is zero at every position: the head writes nothing into the residual stream.
    "output-mean"      the output is its mean over all tokens of the calibration prompts, each counting once.
    "output-resample"  the output at each slot is what the head gave at a token of the calibration prompts, drawn from
                       all of them alike whatever their lengths (from 1024 drawn beforehand, if they have more). The
                       draw depends on `seed` and the slot only: it is the same for all heads, layers and rows, and in a
                       prefill, a decode step and behind a prefix. Its expectation is what "output-mean" gives. Slots
                       counted from the end would tie the draw to where a forward pass happens to stop.
    "query-zero"       the query is zero: the head attends to all visible keys alike, and goes on writing the mean of
                       their values. The published ablation of LOCOS, and Wu et al.'s masking (theirs in decoding only).
    "query-mean"       the query is its mean over all tokens of the calibration prompts; the rotary embedding still
                       turns it with the position. LOCOS's other published ablation.
    "needle-knockout"  the head does not see the keys in `needle`; its softmax is over the other visible keys. A row
                       that sees no others gives zero. No gradients flow through these heads.

    Key/value heads are left alone, so that the other query heads of a group see what they saw.

    heads: or a list of such lists, one for each row of the batch that is run, in any mode; a row's may be empty.
    calibration: (1, N) token ids, or lists of them, of other prompts than those evaluated (a warning says if not), or
    `CalibratedMeans.of(model, prompts)`, which measures once for many ablations. Measured on the intact model, also
    inside other ablations. needle: (start, end) in slots, or several, or an int (B, S, 2) tensor with each row's own.
    What a mode does not need is ignored.

    Contexts may be nested, with other modes too, and with `record`, which then sees heads as ablated (what output
    modes put in their place stands behind what it records). What a cache holds was computed as the model was then:
    extend a shared prefix inside the context for it to be ablated too.

    Raises ValueError for heads the model does not have, for no heads, for unknown modes and for what a mode lacks;
    UnsupportedModelError as `record` does, and for query modes where a layer's queries cannot be told apart. Warns
    where a query is normalised together with those of other heads, which it then rescales.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    layers, chosen = chosen_heads(model, heads)
    with contextlib.ExitStack() as stack:
        if mode in CALIBRATED:
            means = CalibratedMeans.needed(model, calibration, mode, list(chosen))
            stack.enter_context(_watch_prompts(model, means))
        if mode == "needle-knockout":
            stack.enter_context(hide_needle(model, layers, chosen, _needle_table(needle)))
        elif mode == "query-zero":
            stack.enter_context(replace_queries(model, layers, chosen, lambda number: zero))
        elif mode == "query-mean":
            stack.enter_context(replace_queries(model, layers, chosen, lambda number: constant(means.queries[number])))
        elif mode == "output-zero":
            stack.enter_context(replace_outputs(model, layers, chosen, lambda number: zero))
        elif mode == "output-mean":
            stack.enter_context(replace_outputs(model, layers, chosen, lambda number: constant(means.outputs[number])))
        else:
            of_layer = stack.enter_context(resampled(model, means.donors, seed))
            stack.enter_context(replace_outputs(model, layers, chosen, of_layer))
        yield


def _needle_table(needle: tuple[int, int] | ops.Spans | None) -> Tensor:
    """(B or 1, S, 2) int64."""
    if needle is None:
        raise ValueError("needle: expected (start, end) in slots for mode 'needle-knockout', got None")
    one = isinstance(needle, (tuple, list)) and all(hasattr(x, "__index__") for x in needle)
    try:
        return checked_spans(cast(ops.Spans, [needle] if one else needle))
    except ValueError as error:
        raise ValueError(str(error).replace("spans", "needle", 1)) from error


@contextlib.contextmanager
def _watch_prompts(model: PreTrainedModel, means: CalibratedMeans) -> Iterator[None]:
    """Warn, once, when a forward pass that begins a sequence is given a calibration prompt."""
    warned: list[bool] = []

    def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = read_ids(module, args, kwargs)
        if not any(warned) and ids is not None and read_forward(module, args, kwargs).past == 0:
            warned.append(means.warn_if_evaluated(ids))

    hook = decoder(model).register_forward_pre_hook(unless_intact(model, before_forward), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
