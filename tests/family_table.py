"""The README's table of model families, from running a tiny model of each: `python -m tests.family_table`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.scoring.diagnosis import Diagnosis, diagnose
from tests.oracles import further_families
from tests.oracles.architecture_models import FAMILIES, build


def markdown() -> str:
    """The table: one row per model class, what its layers are, and how exactly they are scored."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for model in _models():
        found, verdict = _examine(model)
        kinds.setdefault((type(model).__name__, verdict), set()).update(found)
    rows = [
        f"| {name} | {', '.join(sorted(kinds[name, verdict])) or '-'} | {verdict} |"
        for name, verdict in sorted(kinds, key=lambda key: key[0].lower())
    ]
    return "\n".join(['| model class | layers | `norm="frozen"` |', "|---|---|---|", *rows])


def _models() -> Iterator[PreTrainedModel]:
    for family, settings in FAMILIES.items():
        yield build(family, settings.implementations[0], dtype=torch.float32)
    yield from further_families.models()


def _examine(model: PreTrainedModel) -> tuple[set[str], str]:
    """Every kind of layer, without the size of its window, which is the tiny model's; and the verdict."""
    try:
        diagnosis = diagnose(model)
    except UnsupportedModelError as error:
        return set(), f"refused: {error}"
    return {re.sub(r" \d+", "", layer.kind) for layer in diagnosis.layers}, _verdict(diagnosis)


def _verdict(diagnosis: Diagnosis) -> str:
    unscored = {layer.kind for layer in diagnosis.layers if layer.heads is None}
    rest = "".join(f"; {kind} layers not scored" for kind in sorted(unscored))
    refused = "" if diagnosis.frozen_refused is None else f": {diagnosis.frozen_refused}"
    return f"{diagnosis.verdict}{refused}{rest}"


if __name__ == "__main__":
    print(markdown())
