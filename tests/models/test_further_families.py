"""Further classes of transformers: scored as the definition says, or refused in one sentence that names the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.scoring.directions import NORMS
from locos_fast.scoring.score import score_tokens
from tests.oracles.definition import ANSWER, LENGTH, distance, naive, naive_scores
from tests.oracles.further_families import EXACT, REFUSED, build, known
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import tokens

IDENTITY = 1e-6  # transformers' norms and softmax compute in float32, also in a float64 model
DEFINITION = 1e-5  # of the largest magnitude
NEEDLE = (10, 20)
ITSELF = "computes attention itself instead of calling transformers' attention interface"
ELSEWHERE = "calls transformers' attention interface, but keeps its output projection elsewhere"
NONE = "has no softmax attention layers to record"
REASONS = {
    "Bert": ELSEWHERE,
    "Bloom": ITSELF,
    "DiffLlama": "calls its attention function several times for one row",
    "Doge": "a different mask for each head",
    "Dory": "calls its attention function several times for one row",  # it runs layers in a loop
    "Falcon": ITSELF,
    "FalconH1": "cannot follow the output of FalconH1Attention into the residual stream",
    "GPTNeo": ITSELF,
    "GPTNeoXJapanese": ITSELF,
    "Kosmos2Text": "is no factor per channel",
    "LongcatFlash": "is not known as an attention layer",
    "Mamba": NONE,
    "Mamba2": NONE,
    "MiniMax": "cannot follow the output of MiniMaxAttention into the residual stream",
    "ModernBertDecoder": "cannot follow the residual stream from the last layer to the unembedding",
    "Mpt": ITSELF,
    "RecurrentGemma": "rescales the output of its Linear",
    "Roberta": ELSEWHERE,
    "Rwkv": NONE,
    "XGLM": ITSELF,
}
PUBLISHED = ("FalconH1", "MiniMax", "ModernBertDecoder", "RecurrentGemma")  # with norm="none" they are scored

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' about kernels that are not installed


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("name", known(EXACT))
def test_contributions_add_up_and_scores_are_the_definition(name: str) -> None:
    model, ids = build(name, "eager", dtype=torch.float64), tokens(1, LENGTH)
    scores = {norm: score_tokens(model, ids, NEEDLE, ANSWER, norm=norm, verify=True) for norm in NORMS}
    truth = naive(model, name, ids)
    for norm in NORMS:
        expected = naive_scores(truth, norm, NEEDLE, scores[norm].score.shape)
        assert distance(scores[norm], expected) <= DEFINITION, norm
    completeness = scores["frozen"].meta["completeness"]
    assert max(completeness["overall"], *completeness["layers"].values()) <= IDENTITY


@pytest.mark.parametrize("name", known(REFUSED))
def test_the_others_are_refused_in_one_sentence(name: str) -> None:
    model, ids = build(name), tokens(1, LENGTH)
    for norm in ("frozen",) if name in PUBLISHED else NORMS:
        with pytest.raises(UnsupportedModelError, match=REASONS[name]) as error:
            score_tokens(model, ids, NEEDLE, ANSWER, norm=norm)
        assert "\n" not in str(error.value)
    if name in PUBLISHED:
        score_tokens(model, ids, NEEDLE, ANSWER, norm="none", verify=True)
