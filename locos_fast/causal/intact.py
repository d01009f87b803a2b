"""The intact model inside its own ablations: what a calibration measures, whatever is ablated around it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from transformers import PreTrainedModel

from locos_fast.models.architecture import attention_layers
from locos_fast.models.attention_registry import registry

_intact: Counter[int] = Counter()  # id of a model -> contexts it is in


@contextlib.contextmanager
def intact(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, ablations and recordings of this model that were begun before do nothing."""
    _intact[id(model)] += 1
    try:
        with registry.undisturbed(layer.module for layer in attention_layers(model)):
            yield
    finally:
        _intact[id(model)] -= 1
        if not _intact[id(model)]:
            del _intact[id(model)]


def unless_intact(model: PreTrainedModel, hook: Callable) -> Callable:
    """A hook that does nothing while its model is to be intact."""
    key = id(model)
    return lambda *given: None if _intact[key] else hook(*given)
