"""The trials of a scan, of whatever data set: tracked to the token, and all they depend on in the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locos_fast.prompts.datasets import read_dataset
from locos_fast.prompts.scan_trials import NO_FOIL, scan_trials
from locos_fast.scans.manifest import Manifest
from tests.oracles.needle_tokenizers import squeezed, trained
from tests.oracles.published_data import NIAH_NEEDLES, NOLIMA_ENTRIES, prose, texts_in, write_niah, write_nolima
from tests.oracles.tiny_tokenizers import KINDS

OWN = [
    {"needle": "Otto owns the quiet bridge.", "question": "Who owns the bridge?", "answer": "Otto", "group": "owner"},
    {"needle": "Mina owns the old river.", "question": "Who owns the river?", "answer": "Mina", "group": "owner"},
]


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest):
    return trained(
        request.param,
        prose(300, 0),
        *texts_in([NIAH_NEEDLES, NOLIMA_ENTRIES, OWN]),
        "Based on the content book Answer Book 1 . 2 : Who owns Otto",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("published")
    (root / "hay.txt").write_text(prose(300, 5), encoding="utf-8")
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, OWN)), encoding="utf-8")
    niah, nolima = write_niah(root / "niah"), write_nolima(root / "nolima")
    return {
        "niah": f"niah:{niah}",
        "nolima": f"nolima:{nolima}",
        "nolima-hard": f"nolima-hard:{nolima}",
        "own": str(root / "own.jsonl"),
        "haystack": str(root / "hay.txt"),
    }


def composed(tokenizer, folders, name: str, **options):
    haystack = folders["haystack"] if name == "own" else None
    return scan_trials(tokenizer, folders[name], lengths=[220, 400], depths=3, haystack=haystack, **options)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["niah", "nolima", "nolima-hard", "own"])
def test_spans_lead_and_foil_are_right_for_every_data_set(tokenizer, folders, name: str, chat: bool) -> None:
    trials, config, notes = composed(tokenizer, folders, name, limit=12, chat_template=chat)
    assert (len(trials), config["dataset"], notes) == (12, name, [])
    for trial in trials:
        spelled = {
            what: squeezed(tokenizer.decode(trial.prompt_ids[slice(*span)]))
            for what, span in {"needle": trial.needle_span, "question": trial.question_span}.items()
        }
        assert spelled["question"] == squeezed(trial.question)
        assert spelled["needle"] in (squeezed(trial.needle), squeezed(trial.needle) + ".")  # a token may go on
        assert squeezed(tokenizer.decode(trial.answer_ids)) == squeezed(trial.answer)
        assert squeezed(tokenizer.decode(trial.foil_ids)) == squeezed(trial.foil) != squeezed(trial.answer)
        assert trial.length == len(trial.prompt_ids) == trial.requested_length
        assert trial.prompt_ids.count(tokenizer.bos_token_id) == 1 == (trial.prompt_ids[0] == tokenizer.bos_token_id)
        assert trial.lead_tokens == 0


def test_a_book_hides_its_own_entries(tokenizer, folders) -> None:
    for trial in composed(tokenizer, folders, "nolima").trials:
        entry = trial.id.split("/")[1].partition("-")[0]
        book = {"0101": "1", "0102": "2", "0103": "1"}[entry]
        assert f"Book{book}." in squeezed(tokenizer.decode(trial.prompt_ids))


def test_a_short_part_is_repeated_and_a_short_book_is_refused(tokenizer, folders) -> None:
    once = len(composed(tokenizer, folders, "niah", limit=1).trials[0].prompt_ids)
    long = scan_trials(tokenizer, folders["niah"], lengths=[10 * once], depths=[100], limit=3).trials
    assert [trial.length for trial in long] == [10 * once] * 3
    with pytest.raises(ValueError, match=r"haystack: its \d+ tokens are too few for prompts of 90000"):
        scan_trials(tokenizer, folders["nolima"], lengths=[90_000], depths=1)


def test_a_needle_longer_than_the_shortest_prompt_is_refused(tokenizer, folders) -> None:
    with pytest.raises(
        ValueError, match=r"length: 25 tokens are too few: needle and question of 'needle-1' alone take"
    ):
        scan_trials(tokenizer, folders["niah"], lengths=[25, 400], depths=1)


def test_a_name_in_the_book_leaves_a_fact_out_and_says_so(tokenizer, tmp_path: Path) -> None:
    folder = write_nolima(tmp_path, books=3)
    spoiled = read_dataset(f"nolima:{folder}").facts[2]
    book = folder / f"haystack/rand_shuffle/{spoiled.haystack}.txt"
    book.write_text(f"{spoiled.answer} came by. {book.read_text()}")
    found = scan_trials(tokenizer, f"nolima:{folder}", lengths=[300], depths=2)
    assert found.config["left_out"] == [spoiled.id]
    assert found.notes == ["1 of 6 facts are left out: their answers stand in the haystack"]
    assert not any(f"/{spoiled.id}/" in trial.id for trial in found.trials)


def owned(folder: Path, *entries: dict) -> str:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return str(path)


BRIDGE = {"needle": "Otto owns the quiet bridge.", "question": "Who owns the river?", "answer": "China", "group": "x"}


def test_a_form_of_ones_own_answer_in_the_haystack_is_a_note_and_the_word_itself_a_mistake(tmp_path: Path) -> None:
    tokenizer = trained("word-level", prose(300, 0), "China Mina")
    hay = tmp_path / "hay.txt"
    given = {"lengths": [220], "depths": 2, "haystack": str(hay)}
    data = owned(tmp_path, BRIDGE, {**BRIDGE, "answer": "Mina"})
    for word, notes in {
        "chin": [],
        "Chinese": ["1 of 2 facts: the haystack may give the answer away; that of mine-1 by 'Chinese'"],
    }.items():
        hay.write_text(f"The {word} river. {prose(300, 5)}")
        found = scan_trials(tokenizer, data, **given)
        assert (len(found.trials), found.notes, found.config["left_out"]) == (4, notes, [])
    hay.write_text(f"The river of China. {prose(300, 5)}")
    with pytest.raises(ValueError, match="haystack: it gives the answer of mine-1 away: 'China'"):
        scan_trials(tokenizer, data, **given)


def test_trials_that_ask_the_same_are_asked_once_and_it_is_said(folders, tmp_path: Path) -> None:
    tokenizer = trained("word-level", prose(300, 0))
    given = {"lengths": [220], "haystack": folders["haystack"]}
    meeting = scan_trials(tokenizer, folders["own"], depths=[50, 50.01], limit=4, **given)
    assert [trial.requested_depth for trial in meeting.trials] == [50, 50]
    assert "2 of 4 trials are left out: they ask the same of the same prompt as others" in meeting.notes
    twice = scan_trials(tokenizer, owned(tmp_path, BRIDGE, BRIDGE), depths=[10, 90], limit=4, **given)
    assert [trial.requested_depth for trial in twice.trials] == [10, 90]
    assert "2 of 4 trials are left out: they ask the same of the same prompt as others" in twice.notes
    for found in (meeting, twice):
        Manifest.of(found.config, found.trials)


def test_a_limit_that_reaches_no_trial_of_a_length_or_depth_says_so(folders) -> None:
    tokenizer = trained("word-level", prose(300, 0))
    given = {"haystack": folders["haystack"], "lengths": [220, 300, 400], "depths": 2}
    notes = scan_trials(tokenizer, folders["own"], limit=1, **given).notes
    assert len(notes) == 2 and all(note.endswith("; raise the limit") for note in notes)
    assert notes[0].startswith("lengths without a trial: ") and notes[1].startswith("depths without a trial: ")
    assert scan_trials(tokenizer, folders["own"], limit=3, **given).notes == []


def test_needles_without_a_group_have_no_foil_and_it_is_said(folders, tmp_path: Path) -> None:
    tokenizer = trained("word-level", prose(300, 0))
    alone = [{key: value for key, value in entry.items() if key != "group"} for entry in OWN]
    found = scan_trials(
        tokenizer, owned(tmp_path, *alone), lengths=[220], depths=2, haystack=folders["haystack"], limit=4
    )
    assert [trial.foil_ids for trial in found.trials] == [None] * 4
    assert found.notes == [NO_FOIL]


def test_needles_are_packed_only_into_their_own_book(tokenizer, folders) -> None:
    found = scan_trials(
        tokenizer, read_dataset(folders["nolima"], characters=4), lengths=[400], needles_per_context=2, limit=20
    )
    assert found.config["contexts"] == "packed" and len(found.trials) == 20
    for trial in found.trials:
        text = squeezed(tokenizer.decode(trial.prompt_ids))
        assert ("Book1." in text) != ("Book2." in text) and squeezed(trial.needle) in text
    with pytest.raises(ValueError, match="only 1 of the facts can stand together, not 2"):
        scan_trials(tokenizer, folders["niah"], lengths=[400], needles_per_context=2)


def test_the_config_changes_with_whatever_the_trials_depend_on(folders, tmp_path: Path) -> None:
    tokenizer = trained("byte-level", prose(300, 0))
    text = tmp_path / "hay.txt"

    def config(name="own", **options) -> str:
        text.write_text(prose(300, 5))
        given = {"lengths": [220, 400], "depths": 3, "haystack": str(text) if name == "own" else None} | options
        found = scan_trials(tokenizer, read_dataset(folders.get(name, name), **given.pop("data", {})), **given)
        json.dumps(found.config)
        return json.dumps(found.config, sort_keys=True)

    configs = [
        config(),
        config(seed=1),
        config(limit=4),
        config(depths=[10, 90]),
        config(lengths="220:400:3"),
        config(chat_template=False),
        config(prompt_suffix=" Say it."),
        config(needles_per_context=2, depths=None),
        config("niah"),
        config("nolima"),
        config("nolima", data={"question_type": "twohop"}),
        config("nolima", data={"characters": 2}),
        config("nolima", data={"seed": 1}),
    ]
    assert len(set(configs)) == len(configs) and config() == configs[0]
    assert (
        json.loads(configs[0])["haystack_sha256"]
        != json.loads(config(haystack=folders["own"], limit=1, lengths=[60], depths=1))["haystack_sha256"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haystack": "essays"}, "haystack: niah brings its own, got 'essays'"),
        ({"limit": 0}, "limit: expected at least 1 trial, got 0"),
        ({"needles_per_context": 0}, "needles-per-context: expected at least 1, got 0"),
        ({"needles_per_context": 2, "depths": 3}, "depths: --needles-per-context spreads the needles evenly"),
        ({"depths": [-1]}, r"depths: expected percentages from 0 to 100 with commas between, got \[-1\]"),
        ({"depths": []}, "depths: expected percentages"),
        ({"lengths": []}, "lengths: expected"),
        ({"lengths": [0]}, "lengths: expected at least 1 token"),
    ],
)
def test_what_fits_no_scan_is_refused(folders, options: dict, message: str) -> None:
    tokenizer = trained("word-level", prose(100, 0))
    with pytest.raises(ValueError, match=f"^{message}"):
        scan_trials(tokenizer, folders["niah"], **({"lengths": [400]} | options))


def test_a_chat_without_a_template_is_refused(folders) -> None:
    tokenizer = trained("word-level", prose(100, 0))
    tokenizer.chat_template = None
    assert not scan_trials(tokenizer, folders["niah"], lengths=[400], limit=1).config["chat_template"]
    with pytest.raises(ValueError, match="chat template: this tokenizer has none"):
        scan_trials(tokenizer, folders["niah"], lengths=[400], limit=1, chat_template=True)
