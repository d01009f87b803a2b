"""A reply passes if it says more than half of the answer's words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from locos_fast.scoring.rouge_gate import passes, rouge_1_recall


@pytest.mark.parametrize(
    ("answer", "generated", "recall"),
    [
        ("Lisbon", "She lives in LISBON.", 1.0),
        ("48213", "The number is 48213", 1.0),
        ("48213", "The number is 482130", 0.0),
        ("eat a sandwich and sit in Dolores Park", "Eat a sandwich.", 3 / 8),
        ("New York", "York", 0.5),
        ("walking tours", "We walked on a tour", 1.0),  # stems
        ("the best of the best", "the best", 2 / 5),  # as often as the answer has it
        ("Lisbon", "", 0.0),
        ("Zürich", "Zurich", 0.0),  # z, rich
        # nothing of these for rouge-score
        ("Москва", "Она живёт в городе МОСКВА.", 1.0),
        ("Москва", "мост, каска, ваза", 0.0),  # its letters are not its word
        ("Нижний Новгород", "Новгород", 0.5),
        ("東京", "彼女は東京に住んでいます。", 1.0),
        ("東京", "京都", 0.5),
        ("नदी", "वह नदी के पास", 1.0),
        ("नदी", "न दी", 0.0),
        ("กรุงเทพ", "อยู่ที่กรุงเทพ", 1.0),
        ("القاهرة", "تعيش في القاهرة.", 1.0),
        ("🦊☀️", "a 🦊 under the ☀", 1.0),
        ("🦊", "a 🐻", 0.0),
        ("…!", "well…", 0.5),
        ("Αθήνα", "ΑΘΉΝΑ!", 1.0),
    ],
)
def test_recall_is_the_share_of_the_answers_words(answer: str, generated: str, recall: float) -> None:
    assert rouge_1_recall(answer, generated) == pytest.approx(recall)


def test_recall_is_that_of_rouge_score() -> None:
    """Asked in a process of its own: the scorer's logging closes a stream that pytest has put in place of stderr."""
    texts = [
        "the red cars were running, running, to the cities of Zürich",
        "A red car runs to the city",
        "It ran 48213 times; 482-13 -- and U.S. cities' names",
        "running times: 48213 48213",
        "the the the of of",
    ]
    pairs = [(answer, generated) for answer in texts for generated in texts]
    code = (
        "import json, sys\nfrom rouge_score.rouge_scorer import RougeScorer\n"
        "scorer = RougeScorer(['rouge1'], use_stemmer=True)\n"
        "print(json.dumps([scorer.score(*pair)['rouge1'].recall for pair in json.load(sys.stdin)]))"
    )
    asked = {"input": json.dumps(pairs), "capture_output": True, "text": True, "check": True, "timeout": 120}
    expected = json.loads(subprocess.run([sys.executable, "-c", code], **asked).stdout)
    assert len({round(recall, 6) for recall in expected}) > 5
    assert [rouge_1_recall(*pair) for pair in pairs] == pytest.approx(expected, abs=1e-12)


def test_half_is_not_enough() -> None:
    assert not passes("New York", "York")
    assert passes("New York City", "York city")
    assert passes("New York", "York", threshold=0.49)
    assert not passes("Lisbon", "Paris", threshold=0)


@pytest.mark.parametrize("threshold", [-0.1, 1, 50, float("nan")])
def test_a_threshold_that_is_no_share_below_one_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold: expected a share"):
        passes("Lisbon", "Lisbon", threshold)


def test_an_answer_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="answer: expected text, got nothing"):
        rouge_1_recall("  ", "Lisbon")


def test_importing_the_gate_does_not_import_nltk() -> None:
    code = (
        "import sys, locos_fast, locos_fast.cli, locos_fast.scoring.rouge_gate as gate\n"
        "assert not {'nltk', 'rouge_score'} & set(sys.modules)\n"
        "assert gate.passes('a', 'a') and 'rouge_score' in sys.modules and 'absl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
