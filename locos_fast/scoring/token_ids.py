"""Token ids that are given to a model, checked: PyTorch reads negative ones from the end of the vocabulary."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.architecture import unembedding


def check_token_ids(model: PreTrainedModel, input_ids: Tensor, answer_positions: Sequence[int]) -> None:
    """Raises ValueError for ids that the model cannot embed and for answer ids that it has no logit for.

    The two differ where tokens, of images say, are read but never written.
    """
    _check("input_ids", input_ids[0].tolist(), _rows(model.get_input_embeddings()))
    _check("input_ids", input_ids[0, list(answer_positions)].tolist(), _rows(unembedding(model)))


def check_foil_ids(model: PreTrainedModel, foil_ids: Sequence[int]) -> None:
    """Raises ValueError for ids that the model has no logit for."""
    _check("foil_ids", foil_ids, _rows(unembedding(model)))


def contrast_ids(model: PreTrainedModel, contrast: Any, count: int) -> str | list[int] | None:
    """`contrast` with its token ids as ints: None, "mean", or `count` ids. Raises ValueError for anything else."""
    if contrast is None or (isinstance(contrast, str) and contrast == "mean"):
        return contrast
    try:
        ids = [operator.index(token) for token in contrast]
    except TypeError:
        ids = []
    if isinstance(contrast, (str, set)) or len(ids) != count:
        raise ValueError(f'contrast: expected "mean" or {count} token ids, got {contrast!r}')
    _check("contrast", ids, _rows(unembedding(model)))
    return ids


def _check(argument: str, ids: Iterable[int], vocabulary: int | None) -> None:
    for token in ids:
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            most = "" if vocabulary is None else f"..{vocabulary - 1}"
            raise ValueError(f"{argument}: expected token ids of the model's vocabulary, 0{most}, got {token}")


def _rows(module: Any) -> int | None:
    """Tokens of an embedding or unembedding; None where its weight does not tell, because it is packed."""
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2 else None
