"""Sets of heads, chosen by a score, listed, or read from files that others write."""

import json

import numpy as np
import pytest

from locos_fast.causal.head_sets import Ranking, given_heads, parse_head, parse_heads, read_heads
from locos_fast.causal.model_shape import ModelShape
from locos_fast.scoring.head_scores import ARRAYS, HeadScores

SHAPE = ModelShape.uniform(layers=3, heads=4, kv_heads=2)
NAN = float("nan")
SCORE = [[0.1, 5.0, -2.0, 0.1], [NAN, NAN, NAN, NAN], [3.0, -7.0, 0.0, 4.9]]


def scores() -> HeadScores:
    arrays = {name: np.zeros((3, 4)) for name in ARRAYS}
    arrays |= {"score": np.array(SCORE), "wu": np.full((3, 4), NAN), "dla": -np.array(SCORE)}
    return HeadScores.of(arrays | {"qr": np.arange(12.0).reshape(3, 4)})


@pytest.fixture
def folder(tmp_path):
    scores().save_pretrained(tmp_path / "scan")
    return tmp_path / "scan"


def written(tmp_path, content) -> str:
    path = tmp_path / "heads.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_top_and_bottom_leave_out_heads_without_a_value_and_break_ties_by_layer_and_head():
    ranking = Ranking.of(scores())
    assert ranking.top(5) == [(0, 1), (2, 3), (2, 0), (0, 0), (0, 3)]
    assert ranking.bottom(8) == [(2, 1), (0, 2), (2, 2), (0, 0), (0, 3), (2, 0), (2, 3), (0, 1)]
    assert ranking.top(8)[:5] == scores().top(5)


def test_every_array_ranks_further_detectors_included():
    assert Ranking.of(scores(), "dla").top(2) == [(2, 1), (0, 2)]
    assert Ranking.of(scores(), "qr").top(2) == [(2, 3), (2, 2)]


def test_a_threshold_is_reached_by_heads_that_equal_it():
    assert Ranking.of(scores()).at_least(3.0) == [(0, 1), (2, 3), (2, 0)]
    assert len(Ranking.of(scores()).at_least(-100)) == 8


@pytest.mark.parametrize("share", [0.02, 0.1, 0.6, 0.99, 1])
def test_a_share_is_of_the_largest_value_as_in_found(share):
    assert Ranking.of(scores()).share(share) == scores().found(share)


@pytest.mark.parametrize(
    "choose, message",
    [
        (lambda r: r.top(9), "k: expected 1 to 8, the heads with a value in array 'score', got 9"),
        (lambda r: r.bottom(9), "k: expected 1 to 8"),
        (lambda r: r.top(0), "k: expected 1 to 8"),
        (lambda r: r.top(-1), "k: expected a whole number"),
        (lambda r: r.top(1.5), "k: expected a whole number"),
        (lambda r: r.at_least(5.1), "threshold: no head of array 'score' reaches 5.1; the largest value is 5"),
        (lambda r: r.at_least(NAN), "threshold: expected a number"),
        (lambda r: r.share(0), "share: expected a share of the largest value"),
        (lambda r: r.share(1.1), "share: expected a share of the largest value"),
        (lambda r: Ranking({(0, 0): -1.0}).share(0.5), "share: no head of the ranking has a positive value"),
        (lambda r: Ranking({}), "heads: the ranking has no head with a value"),
        (lambda r: Ranking.of(scores(), "wu"), "heads: array 'wu' has no head with a value"),
        (lambda r: Ranking.of(scores(), "locos"), "by: expected one of score, .*qr, got 'locos'"),
    ],
)
def test_a_choice_that_gives_no_set_is_refused(choose, message):
    with pytest.raises(ValueError, match=message):
        choose(Ranking.of(scores()))


def test_heads_are_read_in_both_spellings():
    assert parse_head("12-7") == parse_head("L12H7") == parse_head(" 12-7 ") == (12, 7)
    assert parse_heads("18-6, L23H2,0-0") == [(18, 6), (23, 2), (0, 0)]


@pytest.mark.parametrize("text", ["", "12", "12-", "12-7-1", "L12", "12H7", "l12h7", "-1-2", "1.0-2", "12-7,", "١-٢"])
def test_what_is_no_head_is_refused(text):
    with pytest.raises(ValueError, match="heads: expected a head such as"):
        parse_heads(text)


def test_a_score_folder_is_ranked_by_the_array_asked_for(folder):
    assert read_heads(folder, SHAPE, k=2) == [(0, 1), (2, 3)]
    assert read_heads(folder, SHAPE, k=2, by="dla") == given_heads(folder, SHAPE, k=2, by="dla") == [(2, 1), (0, 2)]


FLAT = {"0-0": [1.0, 2.0], "0-1": [5.0], "2-3": [0, 8, 1], "2-10": []}  # means 1.5, 5, 3 and none


@pytest.mark.parametrize(
    "content, heads",
    [
        (FLAT, [(0, 1), (2, 3)]),  # Wu et al.
        (json.dumps({"meta": {"method": "x"}, "scores": FLAT}, indent=2), [(0, 1), (2, 3)]),  # LOCOS
        ({"0-0": 1, "0-1": 3.5, "2-2": 2}, [(0, 1), (2, 2)]),
        ([["1-3", 0.2], ["0-1", 0.9], ["2-0", 0.5]], [(0, 1), (2, 0)]),  # QRHead, in any order
        ([[2, 1], [0, 3], [1, 1]], [(2, 1), (0, 3)]),
        (["L2H1", "0-3", "1-1"], [(2, 1), (0, 3)]),
        (["2-1", [0, 3]], [(2, 1), (0, 3)]),
    ],
)
def test_files_of_others_give_their_best_heads(tmp_path, content, heads):
    path = written(tmp_path, content)
    assert read_heads(path, SHAPE, k=2) == given_heads(path, SHAPE, k=2) == heads


def test_a_list_without_values_is_taken_whole_unless_k_says_otherwise(tmp_path):
    path = written(tmp_path, [[2, 1], [0, 3], [1, 1]])
    assert read_heads(path, SHAPE) == [(2, 1), (0, 3), (1, 1)]
    assert given_heads("2-1,0-3,1-1", SHAPE) == [(2, 1), (0, 3), (1, 1)]
    assert given_heads("2-1,0-3,1-1", SHAPE, k=1) == [(2, 1)]


def test_layers_without_softmax_attention_may_have_values_in_a_file(tmp_path):
    """Formats that want a full grid are filled with zeros there."""
    hybrid = ModelShape(3, {0: 4, 2: 4}, {0: 2, 2: 2})
    path = written(tmp_path, {"0-0": 1.0, "1-0": 0.0, "2-0": -1.0})
    assert read_heads(path, hybrid, k=1) == [(0, 0)]
    with pytest.raises(ValueError, match="heads: 1-0: layer 1 of the model has no softmax attention"):
        read_heads(path, hybrid, k=2)


@pytest.mark.parametrize(
    "content, options, message",
    [
        ("{", {}, "heads: .*heads.json is no JSON"),
        ("[" * 100_000, {}, "heads: .*heads.json is no JSON"),
        ("3", {}, "heads: .*heads.json: expected a JSON object or list, got 3"),
        ([], {}, "heads: expected at least one head, got none"),
        ({}, {}, "heads: .*heads.json: has no head with a value"),
        ({"0-0": []}, {"k": 1}, "has no head with a value"),
        ({"model_type": "llama"}, {"k": 1}, "heads.json: expected a head such as .* got 'model_type'"),
        ({"0-0": ["a"]}, {"k": 1}, "heads.json: 0-0: expected a finite score or a list of them, got "),
        ({"0-0": True}, {"k": 1}, "0-0: expected a finite score"),
        ('{"0-0": [NaN]}', {"k": 1}, "0-0: expected a finite score"),
        ([["0-0", 1], ["L0H0", 2]], {"k": 1}, "heads.json: 0-0 is named twice"),
        ([[0, 0], [0, 0]], {}, "0-0 is named twice"),
        ([[0, 0, 1]], {}, "in all entries"),
        ([[0, 0], ["0-1", 0.5]], {}, "in all entries"),
        ([[0, 4]], {}, "the model has no softmax-attention head 0-4"),
        ({"0-0": 1, "3-0": 0}, {"k": 1}, "heads.json has a score of head 3-0, the model has 3 layers of 4 heads"),
        ({"0-0": 1, "0-1": 0}, {}, "k: .*heads.json ranks 2 heads; say how many of the best to take"),
        ({"0-0": 1, "0-1": 0}, {"k": 3}, "k: expected 1 to 2"),
        ({"0-0": 1}, {"k": 1, "by": "score"}, "by: .*heads.json holds one value a head"),
        ([[0, 0]], {"k": 2}, "k: expected 1 to 1, the heads in"),
        ([[0, 0]], {"by": "score"}, "by: .* names heads without scores"),
    ],
)
def test_a_file_that_gives_no_set_is_refused(tmp_path, content, options, message):
    with pytest.raises(ValueError, match=message):
        read_heads(written(tmp_path, content), SHAPE, **options)


def test_a_scan_of_another_models_shape_is_refused(folder):
    other = ModelShape.uniform(layers=4, heads=4)
    with pytest.raises(ValueError, match="scan holds scores of 3 layers of 4 heads, the model has 4 layers of 4 heads"):
        read_heads(folder, other, k=2)


def test_a_folder_that_holds_no_scores_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"is not a score folder: it has no config\.json"):
        read_heads(tmp_path, SHAPE, k=1)
    with pytest.raises(ValueError, match=r"k: .*scan ranks 8 heads; say how many"):
        read_heads(folder, SHAPE)
    with pytest.raises(ValueError, match="by: expected one of score"):
        read_heads(folder, SHAPE, k=1, by="locos")


def test_what_is_neither_a_list_nor_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heads: expected a list such as 18-6,23-2, a score folder or a file, got"):
        given_heads(str(tmp_path / "none"), SHAPE)
    with pytest.raises(ValueError, match="heads: cannot read"):
        read_heads(tmp_path / "none.json", SHAPE)
    with pytest.raises(ValueError, match="no softmax-attention head 0-9"):
        given_heads("0-9", SHAPE)
