"""Several prompts behind one beginning, in one forward pass: the scores of each alone."""

from __future__ import annotations

import pytest
import torch

from locos_fast import HeadScores, LocosScorer, Trial
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.scoring import shared_prefixes
from locos_fast.scoring.checked_prompt import Prompt
from locos_fast.scoring.prompt_parts import PromptParts
from locos_fast.scoring.score import score_prompts
from locos_fast.scoring.shared_prefixes import behind_shared_prefixes, trial_tree
from tests.oracles.architecture_models import build
from tests.oracles.scores import NumberNames, assert_same
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import tokens

HAYSTACK = tokens(60).tolist()
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gemma4", "llama4", "gpt_oss", "deepseek_v3")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def packed() -> list[Trial]:
    """Questions of several lengths about several needles of one context, with answers of several lengths; one needle
    lies outside every window, one answer has a foil that is shorter, one has none, one has one that begins alike."""
    trials = []
    for number, (question, answer, foil) in enumerate(
        [([11, 12], [9, 20], [21]), ([13, 14, 15], [22], None), ([16], [23, 24, 25], [23, 2, 3]), ([17, 18], [9], [4])]
    ):
        prompt = [*HAYSTACK, *question, 5, 6]
        start = 2 + 15 * number
        trials.append(
            Trial(
                prompt_ids=prompt,
                needle_span=(start, start + 3 + number),
                answer_ids=answer,
                question="q",
                needle="n",
                answer="a",
                depth=50,
                length=len(prompt),
                id=str(number),
                question_span=(60, 60 + len(question)),
                lead_tokens=number % 2,
                foil_ids=foil,
            )
        )
    return trials


def rows_of_each_pass(model, run) -> tuple[list[int], list[HeadScores]]:
    PrefixCache(model)
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        return rows, run()
    finally:
        hook.remove()


@pytest.mark.parametrize("norm", ["none", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_prompt_alone(family: str, norm: str) -> None:
    model, trials = build(family, dtype=torch.float32), packed()
    scorer = LocosScorer(model, NumberNames(), norm=norm)
    rows, found = rows_of_each_pass(model, lambda: scorer.score_many(trials, detectors="all", verify=True))
    assert [count for count in rows if count > 1] == [4]
    for scores, trial in zip(found, trials, strict=True):
        alone = scorer.score(trial, detectors="all")
        assert_same(scores, alone)
        for name in ("predicted_ids", "needle_visible_share", "answer_positions"):
            assert scores.meta[name] == alone.meta[name]


def test_a_model_with_states_runs_each_alone() -> None:
    model, trials = build("qwen3_next", dtype=torch.float32), packed()
    rows, found = rows_of_each_pass(
        model, lambda: LocosScorer(model, NumberNames()).score_many(trials, detectors="all")
    )
    assert set(rows) == {1} and all(scores.meta["prefix_tokens"] > 16 for scores in found)


@pytest.mark.parametrize("limit", ["SHORT", "TOGETHER_BYTES"])
def test_long_rests_and_large_caches_run_alone(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(shared_prefixes, limit, 2)
    model, trials = build("llama", dtype=torch.float32), packed()
    rows, _ = rows_of_each_pass(model, lambda: LocosScorer(model, NumberNames()).score_many(trials))
    assert set(rows) == {1}


def test_a_group_is_handed_over_whole_or_not_at_all() -> None:
    """So that the bits of a trial do not depend on which of the others are done."""
    model, trials = build("llama", dtype=torch.float32), packed()
    tree = trial_tree(trials)

    def groups(skip: set[int]) -> list[list[int]]:
        return [group.trials for group in behind_shared_prefixes(model, trials, tree, token_chunk=None, skip=skip)]

    assert [sorted(group) for group in groups({0, 3})] == [[0, 1, 2, 3]]
    assert groups({0, 1, 2, 3}) == []


def test_prompts_that_cannot_share_a_pass_are_refused() -> None:
    model, trials = build("llama"), packed()
    prompts = [Prompt.checked(model, t.input_ids, t.needle_span, t.answer_positions) for t in trials]
    with pytest.raises(ValueError, match="prompts: expected a prefix"):
        score_prompts(model, prompts)
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        score_prompts(model, [])
    prefix = PrefixCache(model)
    prefix.extend(trials[0].input_ids[:, :40])
    two = Prompt.checked(model, trials[0].input_ids, [(1, 3), (5, 7)], trials[0].answer_positions)
    with pytest.raises(ValueError, match="needles in as many places"):
        score_prompts(model, [two, prompts[1]], prefix)
    early = PromptParts(len(trials[0].prompt_ids), question=(30, 35))
    reads = Prompt.checked(model, trials[0].input_ids, (1, 3), trials[0].answer_positions, parts=early)
    with pytest.raises(ValueError, match="prefix: expected fewer tokens than the first answer row"):
        score_prompts(model, [reads], prefix)
