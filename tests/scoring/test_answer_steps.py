"""The tokens of a reply that spell the answer are found, whatever the vocabulary, and no others."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from locos_fast.models.generation import StopRules, generate_greedily
from locos_fast.models.loading import load
from locos_fast.prompts.built_in_facts import numbers
from locos_fast.prompts.haystacks import essays
from locos_fast.prompts.needle_prompt import Composer, Haystack
from locos_fast.scoring.answer_steps import find_answer_steps
from locos_fast.scoring.rouge_gate import passes
from tests.oracles import tiny_tokenizers

TEXT = "I think that it is Paris. Paris, Lisbon and Rome lie in Europe.\n\nThe number is 48213. <think></think> " * 5
BYTEWISE = {"byte-level": tiny_tokenizers.byte_level, "byte fallback": tiny_tokenizers.byte_fallback}
KINDS = tiny_tokenizers.KINDS | BYTEWISE


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param](TEXT)


@pytest.fixture(params=BYTEWISE, scope="module")
def bytewise(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return BYTEWISE[request.param](TEXT)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def squeezed(text: str) -> str:
    return "".join(text.split())


# --- exact ids


@pytest.mark.parametrize("reply", ["Paris", "I think that it is Paris.", "Lisbon and Paris and Paris"])
def test_the_first_exact_occurrence_is_found(tokenizer, reply: str) -> None:
    ids = ids_of(tokenizer, reply)
    steps = find_answer_steps(tokenizer, ids, "Paris")
    assert tokenizer.decode([ids[i] for i in steps]).strip(" .,") == "Paris"
    assert squeezed(tokenizer.decode(ids[: steps[0]])) == squeezed(reply[: reply.index("Paris")])


def test_the_ids_behind_the_prompt_come_first() -> None:
    tokenizer = tiny_tokenizers.byte_level(TEXT)
    behind, alone = ids_of(tokenizer, " 48213"), ids_of(tokenizer, "48213")
    assert behind[0] not in alone  # a space of its own
    reply = [*alone, *ids_of(tokenizer, " and"), *behind]
    assert find_answer_steps(tokenizer, reply, "48213", behind) == list(range(len(reply) - len(behind), len(reply)))
    assert find_answer_steps(tokenizer, reply, "48213") == list(range(len(alone)))


def test_an_unknown_word_is_not_found_in_another_one() -> None:
    tokenizer = tiny_tokenizers.word_level(TEXT)
    assert find_answer_steps(tokenizer, ids_of(tokenizer, "it is Budapest"), "Bucharest") == []


# --- text


@pytest.mark.parametrize("reply", ["it is PARIS.", "it is paris", "it is pArIs, I think"])
def test_case_does_not_matter(bytewise, reply: str) -> None:
    ids = ids_of(bytewise, reply)
    steps = find_answer_steps(bytewise, ids, "Paris")
    assert bytewise.decode([ids[i] for i in steps]).strip(" .,").lower() == "paris"


def test_tokens_with_more_than_the_answer_are_steps_and_their_neighbours_are_not() -> None:
    tokenizer = tiny_tokenizers.byte_level("it said Paris.\n\n" * 50 + "is Paris")
    ids = ids_of(tokenizer, "it said paris.\n\nis Paris")
    steps = find_answer_steps(tokenizer, ids, "said Paris.")  # its ids are nowhere: the case is another
    assert tokenizer.decode([ids[i] for i in steps]) == " said paris.\n\n"


@pytest.mark.parametrize("answer", ["é", "東京", "🦊", "Zürich", "Łódź", "Москва", "नदी"])
@pytest.mark.parametrize("reply", ["it is {}.", "{}", "Paris: {}, Rome, {}", "東{}"])
def test_characters_of_several_tokens_are_found_with_all_of_them(bytewise, answer: str, reply: str) -> None:
    """Also by their text alone, where the exact ids cannot be found: a capital letter in front."""
    for asked, said in ((answer, answer), (f"Q{answer}", f"q{answer}")):
        text = reply.format(*[said] * 2)
        ids = ids_of(bytewise, text)
        steps = find_answer_steps(bytewise, ids, asked)
        assert bytewise.decode([ids[i] for i in steps]).strip(" .") == said
        before = bytewise.decode(ids[: steps[0]])
        assert before.strip() == text[: text.index(said)].strip()


def test_a_reply_cut_inside_a_character_still_says_what_came_before(bytewise) -> None:
    ids = ids_of(bytewise, "it is q東京")[:-1]
    steps = find_answer_steps(bytewise, ids, "Q東")
    assert bytewise.decode([ids[i] for i in steps]).strip() == "q東"
    assert find_answer_steps(bytewise, ids, "Q東京") == []


@pytest.mark.parametrize("before", ["straße ", "İİİ ", "ﬁﬁ ", "ßßßßßß "])
@pytest.mark.parametrize(("answer", "said"), [("ROME", "Rome"), ("STRASSE", "straße"), ("straße", "STRASSE")])
def test_letters_that_become_two_without_case_shift_nothing(bytewise, before: str, answer: str, said: str) -> None:
    ids = ids_of(bytewise, f"{before}it is {said}, I think")
    steps = find_answer_steps(bytewise, ids, answer)
    found = bytewise.decode([ids[i] for i in steps]).strip(" ,")
    assert found == ("straße" if before == "straße " and answer != "ROME" else said)


def test_spaces_that_are_lost_at_the_beginning_shift_nothing() -> None:
    tokenizer = tiny_tokenizers.sentencepiece_style(TEXT)
    ids = ids_of(tokenizer, "it is in Europe")
    assert tokenizer.decode(ids[:1]) == tokenizer.decode(ids)[: len(tokenizer.decode(ids[:1]))]
    steps = find_answer_steps(tokenizer, ids, "IN EUROPE")
    assert tokenizer.decode([ids[i] for i in steps]) == "in Europe"


def test_what_is_not_said_has_no_steps(tokenizer) -> None:
    assert find_answer_steps(tokenizer, ids_of(tokenizer, "it is Rome"), "Paris") == []
    assert find_answer_steps(tokenizer, [], "Paris") == []


# --- thoughts


def test_thoughts_are_not_searched(bytewise) -> None:
    thought, said = ids_of(bytewise, "<think>Paris</think>"), ids_of(bytewise, "\n\nit is Paris")
    steps = find_answer_steps(bytewise, thought + said, "Paris")
    assert min(steps) >= len(thought) and steps[-1] == len(thought + said) - 1
    assert find_answer_steps(bytewise, thought, "Paris") == []
    assert find_answer_steps(bytewise, thought, "PARIS") == []


def test_no_answer_reaches_across_thoughts(bytewise) -> None:
    before, thought, after = (ids_of(bytewise, text) for text in ("it is Par", "<think>hm</think>", "is"))
    assert find_answer_steps(bytewise, before + thought + after, "Paris") == []


def test_marks_may_be_given(bytewise) -> None:
    ids = ids_of(bytewise, "Paris, Lisbon and Paris")
    marks = [i < 3 for i in range(len(ids))]
    assert min(find_answer_steps(bytewise, ids, "Paris", thinking=marks)) >= 3
    with pytest.raises(ValueError, match=f"thinking: expected {len(ids)} marks, one for each token, got 1"):
        find_answer_steps(bytewise, ids, "Paris", thinking=[True])


def test_an_answer_that_says_nothing_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="answer: expected text, got nothing"):
        find_answer_steps(tokenizer, [1, 2], " \n")


# --- a real model


@pytest.mark.real
def test_smollm2_says_the_number_and_its_tokens_are_the_answers() -> None:
    model, tokenizer = load("smollm2", dtype="float32", device="cpu")
    fact = numbers(0)[0]
    haystack = Haystack.of(tokenizer, essays()[0])
    for lead in (fact.lead, ""):
        composer = Composer(tokenizer, chat_template=True)
        trial = composer.compose(haystack, [fact._replace(lead=lead)], [50], length=300, trial_id="number")
        reply = generate_greedily(model, trial.prompt_ids, stop=StopRules.of(model, tokenizer))
        steps = find_answer_steps(tokenizer, reply.ids, trial.answer, trial.answer_ids)
        assert passes(trial.answer, tokenizer.decode(reply.said_ids))
        assert tokenizer.decode([reply.ids[i] for i in steps]).strip() == trial.answer
        assert [reply.ids[i] for i in steps] == trial.answer_ids
        if lead:
            assert steps == list(range(len(trial.answer_ids)))
        assert reply.reason in ("stop token", "newline")
