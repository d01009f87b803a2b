"""Many trials on one model: scored in the order given, what they begin with computed once."""

import numpy as np
import pytest
import torch

from locos_fast import HeadScores, LocosScorer, Trial, score_tokens
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.scoring import shared_prefixes
from locos_fast.scoring.shared_prefixes import behind_shared_prefixes, trial_tree
from tests.oracles import tiny_models
from tests.oracles.architecture_models import build
from tests.oracles.scores import NumberNames, assert_same
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import VOCABULARY, tokens

HAYSTACK = tokens(60).tolist()
NINE = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gemma4", "llama4", "gpt_oss", "qwen3_next")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def grid() -> list[Trial]:
    """Needles at four depths of one haystack, and two more questions on one of the contexts; not in their order."""
    trials = []
    for depth, question in ((60, 1), (15, 1), (30, 1), (30, 2), (45, 1), (30, 3)):
        needle = [7, 8, 9, 10]
        prompt = [*HAYSTACK[:depth], *needle, *HAYSTACK[depth:], question % VOCABULARY, 5]
        trials.append(
            Trial(
                prompt_ids=prompt,
                needle_span=(depth, depth + 4),
                answer_ids=[9, 10 + question],
                question=str(question),
                needle="needle",
                answer="answer",
                depth=100 * depth / 60,
                length=len(prompt),
                id=f"{depth}-{question}",
                question_span=(64, 65),
                lead_tokens=1,
                foil_ids=[9, 20],
            )
        )
    return trials


@pytest.mark.parametrize("family", NINE)
def test_scores_are_those_of_each_trial_alone(family: str) -> None:
    scorer, trials = LocosScorer(build(family, dtype=torch.float32), NumberNames()), grid()
    found = scorer.score_many(trials, norm="frozen")
    assert [scores.meta["trial"] for scores in found] == [trial.id for trial in trials]
    for scores, trial in zip(found, trials, strict=True):
        assert_same(scores, scorer.score(trial, norm="frozen"))


@pytest.mark.parametrize("family", NINE)
def test_further_detectors_are_those_of_each_trial_alone(family: str) -> None:
    scorer, trials = LocosScorer(build(family, dtype=torch.float32), NumberNames()), grid()
    found = scorer.score_many(trials, detectors="all")
    assert sum(scores.meta["prefix_tokens"] > 0 for scores in found) >= 4
    for scores, trial in zip(found, trials, strict=True):
        assert "qrhead" in scores.others
        assert_same(scores, scorer.score(trial, detectors="all"))


def test_a_shared_beginning_is_computed_once() -> None:
    model, trials = build("llama", dtype=torch.float32), grid()
    PrefixCache(model)  # which is shown once that the model continues from it
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    LocosScorer(model, NumberNames()).score_many(trials)
    alone = sum(len(trial.prompt_ids) + 1 for trial in trials)  # the last answer token is not fed
    assert sum(fed) < 0.6 * alone


def test_every_trial_is_handed_over_when_it_is_done() -> None:
    trials, seen = grid(), {}
    scores = LocosScorer(build("llama", dtype=torch.float32), NumberNames()).score_many(trials, done=seen.__setitem__)
    assert sorted(seen) == list(range(len(trials)))
    assert all(seen[i] is scores[i] for i in seen)


def test_a_model_without_a_cache_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object) -> None:
        raise UnsupportedModelError("takes no cache")

    monkeypatch.setattr(shared_prefixes, "PrefixCache", refuse)
    found = LocosScorer(build("llama", dtype=torch.float32), NumberNames()).score_many(grid())
    assert {scores.meta["prefix_tokens"] for scores in found} == {0}


def test_no_trials_have_no_scores() -> None:
    assert LocosScorer(build("llama", dtype=torch.float32), NumberNames()).score_many([]) == []


def test_what_is_done_is_skipped_and_the_rest_keeps_its_bits() -> None:
    scorer, trials = LocosScorer(build("gemma3", dtype=torch.float32), NumberNames()), grid()
    tree = trial_tree(trials)

    def scored(skip: set[int]) -> dict[int, HeadScores]:
        walk = behind_shared_prefixes(scorer.model, trials, tree, token_chunk=None, skip=skip)
        return {
            i: score_tokens(
                scorer.model, trials[i].input_ids, trials[i].needle_span, trials[i].answer_positions, prefix=prefix
            )
            for group, prefix in walk
            for i in group
            if i not in skip
        }

    everything, rest = scored(set()), scored({0, 2, 3})
    assert sorted(rest) == [1, 4, 5]
    assert all(np.array_equal(rest[i].score, everything[i].score, equal_nan=True) for i in rest)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_share_nothing(kind: str) -> None:
    """Their keys in a beginning computed alone are others than within the whole prompt."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48, **factors}
    model = tiny_models.build("llama", max_position_embeddings=192, rope_parameters=rope)
    scorer, trials = LocosScorer(model, NumberNames()), grid()
    with pytest.raises(UnsupportedModelError, match=f"rotary embeddings of type '{kind}'"):
        PrefixCache(model)
    for scores, trial in zip(scorer.score_many(trials), trials, strict=True):
        assert scores.meta["prefix_tokens"] == 0
        assert_same(scores, scorer.score(trial))
