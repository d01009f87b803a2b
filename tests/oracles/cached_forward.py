"""A forward pass with a cache, on any release of transformers: 5.24 renamed the argument that takes it."""

from __future__ import annotations

from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from locos_fast.models.prefix_cache import cache_argument


def forward_with_cache(model: PreTrainedModel, *args: Any, cache: Cache, **kwargs: Any) -> ModelOutput:
    """`model(*args, **kwargs)` that reads and fills `cache`."""
    return model(*args, **{cache_argument(model): cache}, **kwargs)
