"""`locos-fast attribute`: it ranks the needle's sentence first, prints the numbers of `attribute_tokens`, and refuses
bad input in one line with exit code 2."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib import image

from locos_fast import attribute_tokens
from locos_fast.cli import app as cli
from locos_fast.models import memory_estimate
from locos_fast.planted.model import KINDS, build
from locos_fast.report.attribution import along_tokens, one_line, save_picture
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.passages import FILES, Passage, PassageAttribution


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with the planted model, a small one, and a prompt; the model and the prompt's trial."""
    folder = tmp_path_factory.mktemp("planted")
    model = build(layers=4)
    model.save_pretrained(folder / "model")
    trial = model.trial(200, "literal", depth=40, seed=3)
    write_prompt(folder / "prompt.txt", model, trial)
    return folder, model, trial


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The planted model as `locos-fast planted` writes it."""
    folder = tmp_path_factory.mktemp("full")
    model = build()
    model.save_pretrained(folder / "model")
    return folder, model


def write_prompt(path, model, trial):
    words = model.tokenizer.convert_ids_to_tokens(trial.prompt_ids[1:])  # the tokenizer adds [BOS] itself
    path.write_text(" ".join(words), encoding="utf-8")


@pytest.fixture
def attribute(planted, capsys, monkeypatch, tmp_path):
    """Run the command in this process with some options changed; returns exit code, stdout, stderr."""
    folder, _, trial = planted
    monkeypatch.chdir(tmp_path)

    def run(*flags, **changes):
        options = {
            "model": folder / "model",
            "prompt": folder / "prompt.txt",
            "answer": trial.answer,
            "device": "cpu",
            "out": tmp_path / "out",
        } | changes
        given = [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None]
        monkeypatch.setattr(sys, "argv", ["locos-fast", "attribute", *given, *flags])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_json_holds_the_numbers_of_attribute_tokens(attribute, planted):
    _, model, trial = planted
    code, out, err = attribute("--json", top=10_000)
    result = json.loads(out)
    assert (code, err) == (0, "")
    spans = sorted((passage["start"], passage["end"]) for passage in result["passages"])
    assert spans[0] == (0, 1) and spans[-1][1] == trial.length
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    expected = attribute_tokens(model.model, trial.input_ids, trial.answer_positions, spans)
    for passage in result["passages"]:
        index = spans.index((passage["start"], passage["end"]))
        layer, head = map(int, passage["head"].split("-"))
        assert passage["passage"] == index
        assert passage["logits"] == pytest.approx(expected[:, :, index].sum(dtype=np.float64), rel=1e-9)
        assert passage["head_logits"] == expected[layer, head, index] == expected[:, :, index].max()
    logits = [passage["logits"] for passage in result["passages"]]
    assert logits == sorted(logits, reverse=True)
    assert [pair["logits"] for pair in result["pairs"]] == sorted(expected.ravel().tolist(), reverse=True)[:10_000]
    for pair in result["pairs"]:
        layer, head = map(int, pair["head"].split("-"))
        assert pair["logits"] == expected[layer, head, pair["passage"]]
    assert (result["meta"]["answer_ids"], result["meta"]["answer_tokens"]) == (trial.answer_ids, [trial.answer])
    first = result["passages"][0]
    assert (first["start"], first["end"], first["text"].strip()) == (*trial.needle_span, trial.needle)
    assert tuple(map(int, first["head"].split("-"))) in model.heads["literal"]


def test_the_folder_holds_array_spans_texts_and_a_picture(attribute, planted, tmp_path):
    _, model, trial = planted
    assert attribute()[0] == 0
    saved = PassageAttribution.from_pretrained(tmp_path / "out")
    spans = [(passage.start, passage.end) for passage in saved.passages]
    expected = attribute_tokens(model.model, trial.input_ids, trial.answer_positions, spans)
    np.testing.assert_array_equal(saved.logits, expected)
    assert saved.passages[0] == (0, 1, "[BOS]")
    assert (*trial.needle_span, trial.needle) in {(*passage[:2], passage.text.strip()) for passage in saved.passages}
    assert saved.meta["cover"]["tokens"] == trial.length
    assert saved.meta["versions"]["torch"] == torch.__version__
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted([*FILES, "attribution.png"])
    assert image.imread(tmp_path / "out" / "attribution.png").std() > 0.01


def test_tables_name_passages_heads_and_answer_tokens(attribute, planted):
    _, model, trial = planted
    code, out, _ = attribute(top=3)
    start, end = trial.needle_span
    layer, head = model.heads["literal"][0]
    first = next(line for line in out.splitlines() if f"{start}:{end}" in line)
    assert code == 0
    assert "1" in first and f"L{layer}H{head}" in first and trial.needle[:10] in first
    assert "[BOS]" in out  # not read as markup
    assert f"answer tokens: {trial.answer!r} ({trial.answer_ids[0]})" in out
    assert "cover 200 of 200 tokens; 0 tokens lie in no segment, 0 in more than one" in out
    assert "those of the answer (1) follow them" in out


def test_overlaps_and_gaps_are_said(attribute, planted):
    _, model, trial = planted
    spans = [(0, 10), (5, 20), (100, 101)]
    code, out, _ = attribute(segments=",".join(f"{start}:{end}" for start, end in spans))
    assert code == 0
    line = "3 segments cover 21 of 200 tokens; 179 tokens lie in no segment, 5 in more than one"
    assert line in out.splitlines()
    code, out, _ = attribute("--json", "--overwrite", segments="0:10,5:20,100:101")
    expected = attribute_tokens(model.model, trial.input_ids, trial.answer_positions, spans).sum((0, 1))
    assert {p["passage"]: p["logits"] for p in json.loads(out)["passages"]} == pytest.approx(dict(enumerate(expected)))


@pytest.mark.parametrize(("segments", "count"), [("paragraphs", 2), ("50", 5), ("1", 200), ("100000", 2)])
def test_other_segments(attribute, segments, count):
    code, out, _ = attribute(segments=segments)
    assert code == 0
    assert f"{count} segments cover 200 of 200 tokens" in out


def test_an_answer_of_several_tokens_is_attributed_as_a_whole(attribute, planted):
    _, model, trial = planted
    code, out, _ = attribute("--json", answer=f"{trial.answer} hosts")
    result = json.loads(out)
    ids = [*trial.answer_ids, *model.tokenizer.convert_tokens_to_ids(["hosts"])]
    assert (code, result["meta"]["answer_ids"]) == (0, ids)
    assert result["meta"]["answer_positions"] == [200, 201]
    first = result["passages"][0]
    tokens = torch.tensor([[*trial.prompt_ids, *ids]])
    [expected] = attribute_tokens(model.model, tokens, [200, 201], [(first["start"], first["end"])]).sum((0, 1))
    assert first["logits"] == pytest.approx(expected)


def test_the_prompt_is_taken_as_it_is(attribute, planted, tmp_path):
    _, _, trial = planted
    text = (planted[0] / "prompt.txt").read_text()
    (tmp_path / "windows.txt").write_bytes(f"[BOS] {text}\r\n\r\n{text}\r\n".encode())
    code, out, _ = attribute("--json", prompt=tmp_path / "windows.txt", segments="paragraphs")
    result = json.loads(out)
    assert code == 0
    assert [(p["start"], p["end"]) for p in sorted(result["passages"], key=lambda p: p["start"])] == [
        (0, 1),
        (1, trial.length),
        (trial.length, 2 * trial.length - 1),
    ]
    assert {p["text"] for p in result["passages"]} >= {"[BOS]"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "length", [1024, pytest.param(8192, marks=pytest.mark.slow), pytest.param(32768, marks=pytest.mark.slow)]
)
def test_the_needle_is_ranked_first(attribute, full, tmp_path, kind, length):
    folder, model = full
    trial = model.trial(length, kind, depth=37, seed=5)
    write_prompt(tmp_path / "prompt.txt", model, trial)
    code, out, _ = attribute(
        "--json", model=folder / "model", prompt=tmp_path / "prompt.txt", answer=trial.answer,
        attn_implementation="sdpa",
    )  # fmt: skip
    result = json.loads(out)
    first, second = result["passages"][:2]
    assert code == 0
    assert (first["start"], first["end"], first["text"].strip()) == (*trial.needle_span, trial.needle)
    assert first["logits"] > 1.5 * second["logits"]
    assert [tuple(map(int, pair["head"].split("-"))) for pair in result["pairs"][:3]] == model.heads[kind]
    assert {pair["passage"] for pair in result["pairs"][:3]} == {first["passage"]}


BAD = {
    "no prompt file": ({"prompt": "missing.txt"}, "prompt: no file"),
    "prompt is a folder": ({"prompt": "."}, "prompt: no file"),
    "empty answer": ({"answer": ""}, "answer: expected text"),
    "answer that is no text": ({"answer": "caf\udce9"}, "answer: expected UTF-8 text"),
    "blank answer": ({"answer": " \n"}, "answer: expected text"),
    "unknown segments": ({"segments": "words"}, "segments: expected sentences, paragraphs, N or START:END"),
    "no segments": ({"segments": ""}, "segments: expected sentences, paragraphs, N or START:END"),
    "blocks of nothing": ({"segments": "0"}, "segments: expected blocks of at least one token, got 0"),
    "blocks of less": ({"segments": "-4"}, "segments: expected blocks of at least one token, got -4"),
    "span beyond the prompt": ({"segments": "0:3,199:201"}, "inside the prompt's 200 tokens, got 199:201"),
    "empty span": ({"segments": "7:7"}, "segments: expected START < END, got 7:7"),
    "span backwards": ({"segments": "9:7"}, "segments: expected START < END, got 9:7"),
    "unknown model path": ({"model": "./no/such/model"}, "model: no folder"),
    "unknown dtype": ({"dtype": "int3"}, "dtype: expected"),
    "device and device map": ({"device_map": "auto"}, "give --device or --device-map"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(attribute, tmp_path, case):
    changes, message = BAD[case]
    code, out, err = attribute(**changes)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompt: expected text, got nothing"),
        (b" \n", "prompt: expected text, got nothing"),
        ("café".encode("latin-1"), "not UTF-8"),
        (b"word . " * 70_000, "longer than the model's 131072 positions"),
    ],
    ids=["empty", "blank", "latin-1", "too long"],
)
def test_prompts_that_cannot_be_used_are_refused(attribute, tmp_path, content, message):
    (tmp_path / "prompt.txt").write_bytes(content)
    code, out, err = attribute(prompt=tmp_path / "prompt.txt")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_prompt_too_large_for_memory_is_refused_with_what_would_fit(attribute, planted, monkeypatch):
    config, tokens = planted[1].model.config, 201
    needed = memory_estimate.estimate(config, tokens, torch.float32, "eager")
    free = needed.weights + (needed.activations + needed.attention) // 3
    monkeypatch.setattr(memory_estimate, "available", lambda device: free)
    code, _, err = attribute(attn_implementation="eager")
    fit = next(
        n for n in range(tokens, 0, -1) if memory_estimate.estimate(config, n, torch.float32, "eager").total <= free
    )
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert 0 < fit < tokens
    assert f"about {fit} tokens would fit" in err
    monkeypatch.setattr(memory_estimate, "available", lambda device: needed.weights)
    assert "not even the weights and one token fit" in attribute(attn_implementation="eager")[2]


def test_results_are_kept_unless_told(attribute, tmp_path):
    assert attribute(out=None)[0] == 0
    before = (tmp_path / "attribution" / "config.json").read_bytes()
    code, _, err = attribute(out=None, segments="10")
    assert (code, "already holds an attribution" in err) == (2, True)
    assert (tmp_path / "attribution" / "config.json").read_bytes() == before
    assert attribute("--overwrite", out=None, segments="10")[0] == 0
    assert PassageAttribution.from_pretrained(tmp_path / "attribution").meta["segments"] == "10"


def test_a_folder_of_another_kind_is_never_overwritten(attribute, planted, tmp_path):
    folder = planted[0]
    arrays = {name: np.zeros((1, 1)) for name in ("score", "l_plus", "l_minus", "dla", "attention_spatial", "wu")}
    scores = HeadScores(**arrays)
    scores.save_pretrained(tmp_path / "scores")
    code, _, err = attribute("--overwrite", out=tmp_path / "scores")
    assert (code, "not of an attribution" in err) == (2, True)
    assert attribute()[0] == 0
    with pytest.raises(FileExistsError, match="not of scores"):
        scores.save_pretrained(tmp_path / "out", overwrite=True)
    code, _, err = attribute(out=folder / "prompt.txt")
    assert (code, "is a file" in err) == (2, True)


def test_folders_that_hold_no_attribution_are_refused(attribute, tmp_path):
    with pytest.raises(FileNotFoundError, match="not an attribution folder"):
        PassageAttribution.from_pretrained(tmp_path)
    assert attribute()[0] == 0
    (tmp_path / "out" / FILES[0]).write_bytes(b"no")
    with pytest.raises(ValueError, match="not an attribution folder"):
        PassageAttribution.from_pretrained(tmp_path / "out")


def test_layers_without_attention_are_left_out_of_rankings_and_drawn_around(tmp_path):
    logits = np.full((2, 3, 4), np.nan, np.float32)
    logits[1] = np.arange(12).reshape(3, 4) - 6
    result = PassageAttribution(logits, [Passage(2 * i, 2 * i + 2, "x") for i in range(4)], {"prompt_tokens": 10})
    assert result.top_passages(2) == [3, 2]
    assert result.strongest_head(3) == (1, 2)
    assert [pair.logits for pair in result.top_pairs(100)] == list(range(5, -7, -1))
    assert result.top_pairs(2) == [((1, 2), 3, 5.0), ((1, 2), 2, 4.0)]
    save_picture(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_heat_map_never_averages_a_short_passage_away():
    passages = [Passage(i, i + 1, "") for i in range(1000)]
    values = np.full((1, 1000), 0.1)
    values[0, 457] = -3
    drawn = along_tokens(values, passages, 2000, 100)
    assert np.isnan(drawn[0, 50:]).all()  # no passage there
    assert drawn[0, 22] == -3
    assert (np.delete(drawn[0, :50], 22) == 0.1).all()


def test_thousands_of_passages_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    passages = [Passage(10 * i, 10 * i + 10, "") for i in range(5000)]
    logits = rng.normal(size=(4, 4, 5000)).astype(np.float32)
    save_picture(
        PassageAttribution(logits, passages, {"prompt_tokens": 50_000, "answer": "$x$ 語"}), tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_passages_are_shown_on_one_line_without_control_characters():
    assert one_line("a\n\n  b\x1b[31m [red]c").plain == "a b [31m [red]c"
    assert len(one_line("word " * 1000).plain) == 120
