"""Needles stand where they were asked for, whatever the vocabulary."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from transformers import PreTrainedTokenizerFast

from locos_fast.models.loading import ModelSource
from locos_fast.prompts.datasets.niah import TEMPLATE as NIAH
from locos_fast.prompts.haystacks import essays
from locos_fast.prompts.needle_grid import foil_of
from locos_fast.prompts.needle_prompt import TEMPLATE as PLAIN
from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack
from tests.oracles.needle_tokenizers import squeezed, trained
from tests.oracles.tiny_tokenizers import KINDS

FACT = Fact("laura", "The magic number for Laura is 48213.", "What is the number for Laura?", "48213", "The number is")
OTHER = Fact("oscar", "The magic number for Oscar is 55017.", "What is the number for Oscar?", "55017", "The number is")
TASKS = {  # what stands around a context
    "plain": PLAIN,
    "niah": NIAH,
    "book": "Here is a book:\n\n{haystack}\n\nSay what it says.\n\nQuestion: {question}\n\n A name only.",
    "asked first": "{question}\n\nLook here: {haystack}",
}


def prose(sentences: int = 300) -> str:
    rng = random.Random(0)
    words = "the old town had many bridges over a quiet river, and people walked there in summer".split()
    ends = (".", ".", ".", "!", "?", '."')
    made = [
        f"{' '.join(rng.choices(words, k=rng.randint(4, 14))).capitalize()}{rng.choice(ends)}" for _ in range(sentences)
    ]
    return " ".join(s + ("\n\n" if i % 9 == 8 else "") for i, s in enumerate(made))


WORDS = (prose(), *FACT[1:5], *OTHER[1:5], *TASKS.values())


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return trained(request.param, *WORDS)


def compose(tokenizer, *, depth=50.0, length=600, chat=False, facts=(FACT,), depths=None, asked=0, text=None):
    composer = Composer(tokenizer, chat_template=chat)
    haystack = Haystack.of(tokenizer, text or prose())
    places = [depth] if depths is None else depths
    return composer.compose(haystack, facts, places, length=length, asked=asked, trial_id="x"), haystack


def assert_within_a_sentence(tokenizer, text: str, depth: float, length: int, task: str) -> None:
    fact = FACT._replace(template=task)
    trial, haystack = compose(tokenizer, facts=(fact,), depth=depth, length=length, text=text)
    last, _ = compose(tokenizer, facts=(fact,), depth=100, length=length, text=text)
    start, end = trial.needle_span
    assert squeezed(tokenizer.decode(trial.prompt_ids[start:end])) == squeezed(FACT.needle)
    opening = len(Composer(tokenizer, chat_template=False).frame(fact).opening)
    place, context = start - opening, last.needle_span[0] - opening
    if depth == 100:
        assert place == context
        return
    assert place in haystack.boundaries  # a whole sentence precedes the needle
    longest = max(after - before for before, after in pairwise(haystack.boundaries) if before < context)
    assert abs(place - context * depth / 100) <= longest
    assert trial.depth == pytest.approx(100 * place / context)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("depth", range(0, 101, 10))
def test_a_needle_lands_within_a_sentence_of_the_depth_asked_for(tokenizer, depth: int, task: str) -> None:
    assert_within_a_sentence(tokenizer, prose(), depth, 600, task)


@pytest.mark.real
def test_a_needle_lands_within_a_sentence_in_the_essays_for_smollm2() -> None:
    tokenizer, text = ModelSource("smollm2").tokenizer(), "\n\n".join(essays()[:2])
    for task in TASKS.values():
        for depth in range(0, 101, 10):
            assert_within_a_sentence(tokenizer, text, depth, 1000, task)


def test_sentences_end_where_the_text_says(tokenizer) -> None:
    haystack = Haystack.of(tokenizer, prose())
    endings = [tokenizer.decode(haystack.ids[:b]).rstrip()[-1] for b in haystack.boundaries[1:20]]
    assert set(endings) <= set('.!?"') and len(haystack.boundaries) > 250


@pytest.mark.parametrize("chat", [False, True])
def test_there_is_one_bos_and_the_length_is_what_was_asked_for(tokenizer, chat: bool) -> None:
    trial, _ = compose(tokenizer, chat=chat)
    assert trial.prompt_ids[0] == tokenizer.bos_token_id
    assert trial.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert trial.length == len(trial.prompt_ids) == 600
    assert (trial.requested_length, trial.requested_depth) == (600, 50.0)


def test_the_reply_begins_with_the_lead_and_goes_on_with_the_answer(tokenizer) -> None:
    trial, _ = compose(tokenizer, chat=True)
    assert squeezed(tokenizer.decode(trial.prompt_ids)).endswith(squeezed("for Laura? <reply> The number is"))
    assert squeezed(tokenizer.decode(trial.answer_ids)) == "48213"


def test_an_answer_is_tokenised_as_the_reply_goes_on() -> None:
    tokenizer = trained("byte-level", *WORDS)
    trial, _ = compose(tokenizer)
    whole = tokenizer("The number is 48213", add_special_tokens=False).input_ids
    assert whole[-len(trial.answer_ids) :] == trial.answer_ids


def test_several_needles_stand_each_at_its_depth(tokenizer) -> None:
    first, _ = compose(tokenizer, facts=(FACT, OTHER), depths=[80, 20], asked=0)
    second, _ = compose(tokenizer, facts=(FACT, OTHER), depths=[80, 20], asked=1)
    for trial, fact in ((first, FACT), (second, OTHER)):
        assert squeezed(tokenizer.decode(trial.prompt_ids[slice(*trial.needle_span)])) == squeezed(fact.needle)
    assert second.needle_span[1] < first.needle_span[0]
    context = first.needle_span[1]
    assert first.prompt_ids[:context] == second.prompt_ids[:context]  # one context, two questions


def test_what_does_not_fit_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"haystack: its \d+ tokens are too few for prompts of 9000"):
        compose(tokenizer, length=9000)
    with pytest.raises(ValueError, match="length: 12 tokens are too few"):
        compose(tokenizer, length=12)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = trained("word-level", *WORDS)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        Composer(tokenizer, chat_template=True)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_question_and_lead_are_known_in_tokens(tokenizer, chat, task):
    trial, _ = compose(tokenizer, chat=chat, facts=(FACT._replace(template=task),))
    question = tokenizer.decode(trial.prompt_ids[slice(*trial.question_span)])
    reply = tokenizer.decode(trial.prompt_ids[len(trial.prompt_ids) - trial.lead_tokens :])
    assert squeezed(question) == squeezed(FACT.question)
    assert squeezed(reply) == squeezed(FACT.lead)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_a_template_stands_around_the_context_as_it_is_written(tokenizer, chat, task):
    fact = FACT._replace(template=task, lead="")
    trial, haystack = compose(tokenizer, chat=chat, facts=(fact,), depth=100)
    composer = Composer(tokenizer, chat_template=chat)
    frame = composer.frame(fact)
    front, back = task.replace("{question}", fact.question).split("{haystack}")
    context = tokenizer.decode(haystack.ids[: len(trial.prompt_ids) - len(frame.opening) - len(frame.closing)])
    opening, closing = (squeezed(tokenizer.decode(ids)) for ids in (frame.opening, frame.closing))
    assert opening == squeezed(("" if chat else "<s>") + composer.before + front)
    assert closing == squeezed(back + composer.after)
    whole = squeezed(tokenizer.decode(trial.prompt_ids))
    assert whole.startswith(opening + squeezed(context)[:100]) and whole.endswith(squeezed(FACT.needle) + closing)


def test_a_template_that_goes_on_without_a_space_is_tokenised_as_a_new_word():
    tokenizer = trained("byte-level", *WORDS)
    fact = FACT._replace(template="{haystack}Question: {question}")
    closing = Composer(tokenizer, chat_template=False).frame(fact).closing
    assert closing[: len(own := tokenizer("Question:", add_special_tokens=False).input_ids)] == own


@pytest.mark.parametrize("template", ["{haystack}", "{question}", "{haystack} {haystack} {question}", ""])
def test_a_template_without_its_two_places_is_refused(template):
    with pytest.raises(ValueError, match=r"template: expected {haystack} and {question} once each"):
        compose(trained("byte-level", *WORDS), facts=(FACT._replace(template=template),))


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_suffix_ends_the_users_message(tokenizer, chat):
    composer = Composer(tokenizer, chat_template=chat, prompt_suffix=" in summer")
    closing = tokenizer.decode(composer.frame(FACT).closing)
    assert squeezed(closing) == squeezed(f"{FACT.question} in summer{composer.after}{FACT.lead}")


def test_only_the_evidence_of_a_needle_is_scored(tokenizer):
    for evidence in ("The magic number", "magic number for", "Laura is 48213."):
        fact = FACT._replace(evidence=evidence)
        trial, _ = compose(tokenizer, facts=(OTHER, fact), depths=[30, 60], asked=1)
        assert squeezed(tokenizer.decode(trial.prompt_ids[slice(*trial.needle_span)])) == squeezed(evidence)
        assert trial.needle == evidence
        assert squeezed(FACT.needle) in squeezed(tokenizer.decode(trial.prompt_ids))


def test_a_foil_is_the_answer_of_another_fact_of_the_group():
    facts = [FACT._replace(id=str(i), answer=answer, group="number") for i, answer in enumerate(["1", "1", "2"])]
    other_kind = FACT._replace(id="3", answer="Rome", group="city")
    assert [foil_of(fact, [*facts, other_kind]) for fact in (*facts, other_kind)] == ["2", "2", "1", None]
    assert foil_of(other_kind._replace(foil="Paris"), facts) == "Paris"


def test_facts_without_a_group_give_each_other_no_foil():
    facts = [FACT._replace(id="1", answer="1234"), FACT._replace(id="2", answer="Berlin")]
    assert [foil_of(fact, facts) for fact in facts] == [None, None]
    assert foil_of(facts[0]._replace(foil="4321"), facts) == "4321"


def test_needles_that_share_a_context_share_it_to_the_token_whichever_is_asked_for(tokenizer):
    facts = [
        FACT._replace(id=name, needle=f"The number of {name} is 7.", question=f"Which number has {name}?", lead=name)
        for name in ("Al", "Bartholomew of the long bridge", "Cy")
    ]
    prompts = [compose(tokenizer, facts=facts, depths=[0, 50, 100], asked=i)[0] for i in range(3)]
    assert len({len(p.prompt_ids) for p in prompts}) > 1
    assert len({tuple(p.prompt_ids[: p.question_span[0]]) for p in prompts}) == 1
    assert max(len(p.prompt_ids) for p in prompts) == 600
