"""The model whose retrieval heads are known by construction."""

from locos_fast.planted.model import KINDS, PlantedModel, build, trial

__all__ = ["KINDS", "PlantedModel", "build", "trial"]
