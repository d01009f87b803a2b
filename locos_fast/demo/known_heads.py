"""The demonstration: find the planted heads with four detectors, then prove them causal by ablation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from locos_fast.causal.ablation import Head, ablate
from locos_fast.causal.controls import layer_matched
from locos_fast.models.description import describe_model
from locos_fast.planted.model import KINDS, PlantedModel, build
from locos_fast.planted.vocabulary import CITIES, NAMES
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.scorer import LocosScorer

TRIALS_PER_KIND = 10
CONTROL_DRAWS = 5
DETECTORS = ("score", "dla", "attention_spatial", "wu")
DECOYS = ("read_only", "write_only")
CHANCE = {"literal": 1 / len(NAMES), "non_literal": 1 / len(CITIES)}

Progress = Callable[[Iterable, str], Iterable]


class Recall(NamedTuple):
    """Share of trials answered right, 0 to 1, per question type."""

    intact: dict[str, float]
    found_ablated: dict[str, float]
    control_ablated: dict[str, list[float]]  # one entry per draw


class DemoResult(NamedTuple):
    planted: PlantedModel
    scores: dict[str, HeadScores]  # question type -> mean over its trials
    recall: Recall

    def planted_heads(self, kind: str) -> set[Head]:
        return set(self.planted.heads[kind])

    def right(self, detector: str, kind: str) -> bool:
        """Whether the detector finds exactly the planted heads of a question type."""
        return set(self.scores[kind].found(by=detector)) == self.planted_heads(kind)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON; heads as "layer-head", recall 0 to 1."""
        return {
            kind: {
                "planted": _names(self.planted.heads[kind]),
                "found": {detector: _names(self.scores[kind].found(by=detector)) for detector in DETECTORS},
                "recall": {
                    "intact": self.recall.intact[kind],
                    "found_ablated": self.recall.found_ablated[kind],
                    "layer_matched": self.recall.control_ablated[kind],
                },
            }
            for kind in KINDS
        }


def _names(heads: Iterable[Head]) -> list[str]:
    return [f"{layer}-{head}" for layer, head in heads]


def run(length: int, *, seed: int = 0, progress: Progress = lambda items, _: items) -> DemoResult:
    """Build the planted model, score both question types, ablate what LOCOS found and layer-matched random heads.

    length: tokens per prompt.
    """
    planted = build(seed=seed)
    scorer = LocosScorer(planted.model, planted.tokenizer)
    trials = {kind: make_trials(planted, kind, length, seed) for kind in KINDS}
    scores = {}
    for kind in KINDS:
        per_trial = [scorer.score(trial) for trial in progress(trials[kind], f"score {kind}")]
        meta = describe_model(planted.model) | {"question_type": kind, "tokens": length, "trials": len(per_trial)}
        meta |= {"model": "planted", "norm": scorer.norm, "seed": seed, "span": "needle against other visible keys"}
        scores[kind] = HeadScores.mean(per_trial, meta)
    return DemoResult(planted, scores, measure_recall(planted, scores, trials, seed, progress))


def make_trials(planted: PlantedModel, kind: str, length: int, seed: int) -> list[Trial]:
    """Trials at evenly spaced depths, each with its own needle and filler."""
    depths = torch.linspace(0, 100, TRIALS_PER_KIND).tolist()
    first = seed * TRIALS_PER_KIND
    return [planted.trial(length, kind, depth=depth, seed=first + i) for i, depth in enumerate(depths)]


def measure_recall(
    planted: PlantedModel,
    scores: dict[str, HeadScores],
    trials: dict[str, list[Trial]],
    seed: int,
    progress: Progress = lambda items, _: items,
) -> Recall:
    """Recall of the intact model, without the heads LOCOS found, and without as many random heads of their layers."""
    found = sorted({head for kind in KINDS for head in scores[kind].found()})
    controls = [layer_matched(planted.model, found, seed=seed + draw).heads for draw in range(CONTROL_DRAWS)]
    runs: Sequence[Sequence[Head]] = [[], found, *controls]
    measured = [{kind: _recall(planted, trials[kind], heads) for kind in KINDS} for heads in progress(runs, "ablate")]
    control = {kind: [one[kind] for one in measured[2:]] for kind in KINDS}
    return Recall(measured[0], measured[1], control)


def _recall(planted: PlantedModel, trials: list[Trial], heads: Sequence[Head]) -> float:
    with ablate(planted.model, heads) if heads else contextlib.nullcontext():
        right = [next_token(planted, trial) == trial.answer_ids[0] for trial in trials]
    return sum(right) / len(right)


@torch.inference_mode()
def next_token(planted: PlantedModel, trial: Trial) -> int:
    """The model's greedy answer to the trial's prompt."""
    ids = torch.tensor([trial.prompt_ids], device=planted.model.device)
    return int(planted.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
