"""The demonstration on the real model, with fewer trials than the command takes."""

import pytest

from locos_fast.demo import real_heads
from locos_fast.scoring.score import score_tokens


@pytest.fixture(scope="module")
def smollm2():
    from locos_fast import load

    return load("smollm2", device="cpu")


def first_trials(tokenizer, kind, count):
    from locos_fast.prompts.haystacks import essays

    trials = real_heads.make_trials(tokenizer, kind, essays(), seed=0)
    return [next(trials) for _ in range(count)]


@pytest.mark.real
@pytest.mark.parametrize("kind", real_heads.NEEDLES)
def test_a_trial_asks_for_what_stands_nowhere_but_in_its_needle(smollm2, kind):
    _, tokenizer = smollm2
    for trial in first_trials(tokenizer, kind, 8):
        start, end = trial.needle_span
        around = tokenizer.decode(trial.prompt_ids[:start]) + tokenizer.decode(trial.prompt_ids[end:])
        assert trial.answer not in around
        assert (trial.answer in tokenizer.decode(trial.prompt_ids[start:end])) == (kind == "literal")
        assert 300 < trial.length < 420


@pytest.mark.real
def test_scores_of_both_norms_from_one_prefill_are_those_of_whole_prompts(smollm2):
    model, tokenizer = smollm2
    (trial,) = first_trials(tokenizer, "literal", 1)
    scores = real_heads.score_if_right(model, trial)
    assert scores is not None
    for norm in real_heads.NORMS:
        whole = score_tokens(model, trial.input_ids, trial.needle_span, trial.answer_positions, norm=norm).score
        # float32 forwards that add up in another order; scores of neighbouring heads lie 1e-2 apart
        assert abs(scores[norm].score - whole).max() <= 1e-5 * abs(whole).max()
    completeness = scores["frozen"].meta["completeness"]
    assert completeness["overall"] < 1e-5  # rounding of a float32 sum


@pytest.mark.real
@pytest.mark.slow
def test_five_best_heads_are_the_cause_and_others_of_their_layers_are_not(monkeypatch):
    monkeypatch.setattr(real_heads, "TRIALS", 5)
    literal = real_heads.run()["literal"]
    assert literal.ablated["locos"][5] <= 0.2  # at most one of the five trials
    assert sum(literal.layer_matched[5]) / len(literal.layer_matched[5]) >= 0.6
