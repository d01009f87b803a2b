"""A forward pass with a cache, on any release of transformers: 5.24 renamed the argument that takes it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput


def forward_with_cache(model: PreTrainedModel, *args: Any, cache: Cache, **kwargs: Any) -> ModelOutput:
    """`model(*args, **kwargs)` that reads and fills `cache`, whatever the model calls it: it is annotated as one."""
    parameters = inspect.signature(model.forward).parameters.values()
    name = next(p.name for p in parameters if "Cache" in str(p.annotation))
    return model(*args, **{name: cache}, **kwargs)
