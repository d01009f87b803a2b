"""A model of which only the shape is there: whatever inspects models takes it, and its weights take no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from locos_fast.models.cache_memory import without_memory
from locos_fast.models.foreign_errors import one_value_error


def weightless(config: Any) -> PreTrainedModel:
    """A model of this configuration, in evaluation mode, in which each parameter is one zero seen in its full shape.

    Parameters that are tied stay one. Unlike on the meta device, every part has an ordinary device.
    Raises ValueError, in one line, for a configuration from which no model can be built.
    """
    with one_value_error("model: config.json describes no model that can be built"):
        model = without_memory(config)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                made[parameter] = nn.Parameter(zeros, requires_grad=False)
            module._parameters[name] = made[parameter]
    return model.eval()
