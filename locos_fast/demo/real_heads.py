"""The demonstration on a real model: rank its heads with five detectors, then ablate the best ones of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from locos_fast.causal.ablation import Head
from locos_fast.causal.controls import layer_matched
from locos_fast.demo.lower_layers import answers_without
from locos_fast.demo.needles import Needle, literal_needles, non_literal_needles
from locos_fast.models.description import describe_model
from locos_fast.models.loading import load
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.prompts.beginnings import beginnings
from locos_fast.prompts.compose import compose
from locos_fast.prompts.haystacks import essays
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.directions import Norm
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.score import score_tokens

NEEDLES: dict[str, Callable[[int], Iterator[Needle]]] = {
    "literal": literal_needles,
    "non_literal": non_literal_needles,
}
MODEL = "smollm2"
CONTEXT_TOKENS = 330  # with needle, question and chat template a prompt is 370 on average
TRIALS = 10  # per question type: that many to score, as many others to ablate
ABLATED = (5, 10)  # heads
CONTROL_DRAWS = 5
NORMS: tuple[Norm, ...] = ("none", "frozen")
GOLDEN_RATIO = 0.6180339887  # its multiples, modulo 1, spread evenly however many there are

Progress = Callable[[Iterable, str], Iterable]


class Detector(NamedTuple):
    """A ranking of heads: an array of `HeadScores`, from a pass with one norm."""

    name: str
    norm: Norm
    array: str


DETECTORS = {
    "locos": Detector("LOCOS", "none", "score"),
    "locos_frozen": Detector("LOCOS, frozen norm", "frozen", "score"),
    "dla": Detector("DLA", "none", "dla"),
    "attention_spatial": Detector("attention-spatial", "none", "attention_spatial"),
    "wu": Detector("Wu copy score", "none", "wu"),
}


class RealResult(NamedTuple):
    """One question type. Recall: share of the test trials that are answered right, 0 to 1."""

    scores: dict[Norm, HeadScores]  # mean over the scored trials
    asked: int  # trials until enough were answered right by the intact model
    scored: int  # trials whose scores the ranking is the mean of
    tested: int  # trials, others than the scored ones, all answered right by the intact model
    best: dict[str, list[Head]]  # detector -> its best heads, those with a positive score only
    ablated: dict[str, dict[int, float | None]]  # detector -> heads ablated -> recall; None: not that many to ablate
    layer_matched: dict[int, list[float]]  # heads ablated -> recall of each draw
    borrowed: dict[int, int]  # heads ablated -> how many of a draw are of another layer than LOCOS's, the nearest


def run(*, seed: int = 0, progress: Progress = lambda items, _: items) -> dict[str, RealResult]:
    """Score and ablate the built-in model on both question types, `literal` and `non_literal`.

    Raises ValueError, saying how to install it, if the model or the essays are not there.
    """
    texts = essays()
    (model, tokenizer), *_ = [load(MODEL) for _ in progress([MODEL], f"load {MODEL}")]
    return {kind: _run_kind(model, tokenizer, kind, texts, seed, progress) for kind in NEEDLES}


def _run_kind(model: Any, tokenizer: Any, kind: str, texts: list[str], seed: int, progress: Progress) -> RealResult:
    trials = make_trials(tokenizer, kind, texts, seed)
    name = kind.replace("_", "-")
    asked = 0
    scored: list[dict[Norm, HeadScores]] = []
    for _ in progress(range(TRIALS), f"score {name} questions"):
        for trial in trials:
            asked += 1
            if (scores := score_if_right(model, trial)) is not None:
                scored.append(scores)
                break
    if not scored:
        raise ValueError(f"model: {MODEL!r} answers none of {asked} {name} questions")
    means = _means(model, kind, seed, scored)
    best = {key: _best(means[detector.norm], detector.array) for key, detector in DETECTORS.items()}
    controls = {
        k: [layer_matched(model, best["locos"][:k], seed=seed + draw) for draw in range(CONTROL_DRAWS)] for k in ABLATED
    }
    of_detectors = [heads[:k] for heads in best.values() for k in ABLATED if len(heads) >= k]
    of_controls = [draw.heads for k in ABLATED for draw in controls[k]]
    head_sets = list(dict.fromkeys(map(_key, [*of_detectors, *of_controls])))
    right: list[list[bool]] = []
    for _ in progress(range(TRIALS), f"ablate, {name} questions"):
        for trial in trials:
            asked += 1
            if (of_trial := answers_without(model, trial, head_sets)) is not None:
                right.append(of_trial)
                break
    if not right:
        raise ValueError(f"model: {MODEL!r} answers too few of {asked} {name} questions")
    recall = {
        _key(heads): sum(column) / len(right) for heads, column in zip(head_sets, zip(*right, strict=True), strict=True)
    }
    return RealResult(
        scores=means,
        asked=asked,
        scored=len(scored),
        tested=len(right),
        best=best,
        ablated={
            key: {k: recall.get(_key(heads[:k])) if len(heads) >= k else None for k in ABLATED}
            for key, heads in best.items()
        },
        layer_matched={k: [recall[_key(draw.heads)] for draw in controls[k]] for k in ABLATED},
        borrowed={k: controls[k][0].borrowed for k in ABLATED},
    )


@torch.inference_mode()
def score_if_right(model: Any, trial: Trial) -> dict[Norm, HeadScores] | None:
    """Scores in both norms, from one prefill of the prompt; None if the answer is not the model's own."""
    prefix = PrefixCache(model)
    ids = trial.input_ids.to(model.device)
    prefix.extend(ids[:, : len(trial.prompt_ids) - 1])
    scores: dict[Norm, HeadScores] = {}
    for norm in NORMS:
        scores[norm] = score_tokens(model, ids, trial.needle_span, trial.answer_positions, norm=norm, prefix=prefix)
        if scores[norm].meta["predicted_ids"] != trial.answer_ids:
            return None
    return scores


def _means(model: Any, kind: str, seed: int, scored: list[dict[Norm, HeadScores]]) -> dict[Norm, HeadScores]:
    meta = describe_model(model) | {"question_type": kind, "seed": seed, "trials": len(scored)}
    meta |= {
        "protocol": "chat template, needle in the beginning of an essay, reply begun with a lead, teacher-forced; "
        "trials whose answer is the model's own",
        "span": "needle tokens against all other keys the answer row sees",
    }
    return {norm: HeadScores.mean([scores[norm] for scores in scored], meta | {"norm": norm}) for norm in NORMS}


def _best(scores: HeadScores, array: str) -> list[Head]:
    values = getattr(scores, array)
    return [head for head in scores.top(max(ABLATED), by=array) if values[head] > 0]


def _key(heads: Iterable[Head]) -> tuple[Head, ...]:
    return tuple(sorted(heads))


def make_trials(tokenizer: Any, kind: str, texts: list[str], seed: int) -> Iterator[Trial]:
    """Trials in the beginnings of different texts, at depths spread over the whole context."""
    free = list(beginnings(tokenizer, texts, CONTEXT_TOKENS))
    for index, needle in enumerate(NEEDLES[kind](seed)):
        context = next((text for text in free if not any(word in text for word in needle.giveaways)), None)
        if context is None:
            return
        free.remove(context)
        with (
            warnings.catch_warnings()
        ):  # a sentence is a large share of so short a context: none lies where it is asked
            warnings.simplefilter("ignore", UserWarning)
            trial = compose(
                tokenizer,
                context=context,
                needle=needle.sentence,
                question=needle.question,
                chat_template=True,
                lead=needle.lead,
                answer=needle.answer,
                depth=100 * (index * GOLDEN_RATIO % 1),
                trial_id=f"{kind}-{index}",
            )
        yield trial
