"""What activation patching says of the planted heads: it finds those that suffice, and no decoys."""

from __future__ import annotations

import numpy as np
import pytest

from locos_fast.causal.activation_patching import METRICS, cri
from locos_fast.planted.model import KINDS, PlantedModel

METRIC_AND_KIND = [(metric, kind) for metric in METRICS for kind in KINDS]


def patched(model: PlantedModel, kind: str, metric: str) -> np.ndarray:
    full_stop = model.tokenizer.convert_tokens_to_ids(".")
    trial = model.trial(64, kind, depth=40, seed=3)
    return cri(model.model, trial, filler_id=full_stop, metric=metric, batch=16)


@pytest.mark.parametrize(("metric", "kind"), METRIC_AND_KIND)
def test_patching_finds_the_planted_heads_and_nothing_else(model: PlantedModel, kind: str, metric: str) -> None:
    scores = patched(model, kind, metric)
    found = {(int(layer), int(head)) for layer, head in np.argwhere(scores >= 0.1 * scores.max())}
    assert found == set(model.heads[kind])
    strongest = sorted(model.heads[kind], key=lambda head: -scores[head])
    assert strongest == model.heads[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_decoys_and_heads_of_the_other_kind_bring_nothing_back(model: PlantedModel, kind: str) -> None:
    scores = patched(model, kind, "first_token_logit_diff")
    others = set().union(*(model.heads[role] for role in model.heads if role not in (kind, "positional")))
    assert len(others) == 9
    assert max(abs(scores[head]) for head in others) < 0.01 * scores.max()


@pytest.mark.parametrize("kind", KINDS)
def test_necessary_heads_that_do_not_suffice_are_not_found(model: PlantedModel, kind: str) -> None:
    """Without either positional head no answer is right (test_planted_ablation), but what one of them knows of the
    needle is of no use where the needle's own tokens are gone."""
    scores = patched(model, kind, "first_token_logit_diff")
    assert max(abs(scores[head]) for head in model.heads["positional"]) < 0.01 * scores.max()
