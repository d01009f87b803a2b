"""The planted model in the two precisions it is made for."""

from __future__ import annotations

import pytest
import torch

from locos_fast import planted
from locos_fast.planted.model import PlantedModel

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, PlantedModel]:
    return {dtype: planted.build(dtype=dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def model(models: dict[torch.dtype, PlantedModel]) -> PlantedModel:
    return models[torch.float32]
