"""The forward pass that scoring and attribution observe: a prompt with its answer, teacher-forced."""

from __future__ import annotations

import inspect
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

    Raises ValueError for logits of NaN or +infinity, of which every score would be made; a model may forbid a token
    with -infinity.
    """
    if prefix is None:
        return _finite(_logits(model, input_ids, rows, {"use_cache": False}))
    prefix.check_continued_by(input_ids, rows)
    rest, rows = input_ids[:, prefix.tokens :], [row - prefix.tokens for row in rows]
    with prefix.branch():
        return _finite(_logits(model, rest, rows, prefix.forward_arguments()))


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


def check_prompt(input_ids: Tensor, answer_positions: Sequence[int]) -> None:
    """Raises ValueError, naming the argument, unless this is one prompt with positions of answer tokens in it."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.dtype != torch.int64:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids: expected (1, N) int64, got {shape} {input_ids.dtype}")
    tokens = input_ids.shape[1]
    if len(answer_positions) == 0:
        raise ValueError("answer_positions: expected at least one position, got none")
    if len(set(answer_positions)) != len(answer_positions):
        raise ValueError(f"answer_positions: expected each position once, got {list(answer_positions)}")
    for position in answer_positions:
        if not hasattr(position, "__index__") or not 1 <= position < tokens:
            raise ValueError(
                f"answer_positions: expected positions in 1..{tokens - 1} (no row predicts token 0), got {position}"
            )
