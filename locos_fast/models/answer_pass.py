"""The forward pass that scoring and attribution observe: a prompt with its answer, teacher-forced."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.prefix_cache import PrefixCache


def answer_logits(
    model: PreTrainedModel, input_ids: Tensor, rows: list[int], prefix: PrefixCache | None = None
) -> Tensor:
    """One forward pass, without a KV cache or behind `prefix`; logits of the answer rows only, (T, vocabulary).

    Raises ValueError for logits that are not finite, see `row_logits`.
    """
    if prefix is None:
        return row_logits(model, input_ids, rows, {"use_cache": False})
    prefix.check_continued_by(input_ids, rows)
    rest, rows = input_ids[:, prefix.tokens :], [row - prefix.tokens for row in rows]
    with prefix.branch():
        return row_logits(model, rest, rows, prefix.forward_arguments())


def continued_logits(
    model: PreTrainedModel, rests: list[Tensor], rows: list[list[int]], prefix: PrefixCache
) -> list[Tensor]:
    """Logits (T, vocabulary) of some rows of each of several (1, n) continuations of `prefix`, in one forward pass.

    They are filled up to the same length with tokens that none of their rows sees. Raises ValueError as `row_logits`.
    """
    length = max(rest.shape[1] for rest in rests)
    ids = torch.cat([torch.nn.functional.pad(rest, (0, length - rest.shape[1])) for rest in rests])
    with prefix.branches(len(rests)):
        logits = model(input_ids=ids, **prefix.forward_arguments()).logits
    return [_finite(of_one[wanted]) for of_one, wanted in zip(logits, rows, strict=True)]


def row_logits(model: PreTrainedModel, input_ids: Tensor, rows: list[int], arguments: dict[str, Any]) -> Tensor:
    """Logits (T, vocabulary) of some rows of one forward pass on (1, N) `input_ids`, given further `arguments`.

    Raises ValueError for logits of NaN or +infinity, of which every score would be made; a model may forbid a token
    with -infinity.
    """
    return _finite(_logits(model, input_ids, rows, arguments))


def _finite(logits: Tensor) -> Tensor:
    if not (logits < torch.inf).all():
        raise ValueError(
            f"model: its logits are not finite in {str(logits.dtype).removeprefix('torch.')}: NaN or infinity in "
            "its weights, or an overflow; try another dtype, bfloat16 or float32"
        )
    return logits


def _logits(model: PreTrainedModel, input_ids: Tensor, rows: list[int], arguments: dict[str, Any]) -> Tensor:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(input_ids, **arguments).logits[0, rows]
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        # a number works wherever the last layer is; an index tensor only on the device of the input
        last = input_ids.shape[1] - rows[0]
        logits = model(input_ids, **arguments, logits_to_keep=last).logits[0]
        return logits[[row - rows[0] for row in rows]]
    wanted = torch.tensor(rows, device=input_ids.device)
    return model(input_ids, **arguments, logits_to_keep=wanted).logits[0]


def check_prompt(input_ids: Tensor, answer_positions: Sequence[int]) -> list[int]:
    """The positions as ints, in the order given.

    Raises ValueError, naming the argument, unless this is one prompt with positions of answer tokens in it.
    """
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.ndim != 2
        or len(input_ids) != 1
        or input_ids.dtype != torch.int64
    ):
        got = (
            f"{tuple(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(f"input_ids: expected (1, N) int64, got {got}")
    tokens = input_ids.shape[1]
    allowed = f"positions in 1..{tokens - 1} (no row predicts token 0)"
    try:
        positions = [operator.index(position) for position in answer_positions]
    except TypeError as error:
        raise ValueError(f"answer_positions: expected {allowed}, got {answer_positions!r}") from error
    if not positions or isinstance(answer_positions, set):  # a set has no order to match a contrast's
        raise ValueError(f"answer_positions: expected a list of at least one position, got {answer_positions!r}")
    if len(set(positions)) != len(positions):
        raise ValueError(f"answer_positions: expected each position once, got {positions}")
    for position in positions:
        if not 1 <= position < tokens:
            raise ValueError(f"answer_positions: expected {allowed}, got {position}")
    return positions
