"""Trials in a chat template: the needle is where the span says, the reply has begun, the answer follows."""

import pytest

import locos_fast
from locos_fast.planted.vocabulary import build_tokenizer
from locos_fast.prompts.chat_trials import beginnings, compose_chat
from locos_fast.prompts.haystacks import essays

CONTEXT = "One thing happened. Then came another one. Nobody knew why. That was all."
GIVEN = {
    "context": CONTEXT,
    "needle": "The special magic number for Laura is 48213.",
    "question": "What is the special magic number for Laura?",
    "lead": "The special magic number for Laura is",
    "answer": "48213",
    "depth": 50.0,
    "id": "literal-0",
}


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer: .* has no chat template"):
        compose_chat(build_tokenizer(max_length=100), **GIVEN)


def test_beginnings_are_whole_sentences_of_at_most_so_many_tokens():
    tokenizer = build_tokenizer(max_length=1000)
    word = "the"
    text = " ".join([*[word] * 4, ".", *[word] * 6, ".", *[word] * 9, "."])
    assert list(beginnings(tokenizer, [text, word], 13)) == [" ".join([*[word] * 4, ".", *[word] * 6, "."])]


@pytest.fixture(scope="module")
def real_tokenizer():
    return locos_fast.load("smollm2", device="cpu")[1]


@pytest.mark.real
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_span_is_the_needle_and_the_answer_goes_on_after_the_lead(real_tokenizer, depth):
    trial = compose_chat(real_tokenizer, **GIVEN | {"depth": depth})
    start, end = trial.needle_span
    prompt = real_tokenizer.decode(trial.prompt_ids)
    assert real_tokenizer.decode(trial.prompt_ids[start:end]).strip() == GIVEN["needle"]
    assert prompt.endswith(f"<|im_start|>assistant\n{GIVEN['lead']}")
    assert prompt.count("<|im_start|>") == 3  # system, user, assistant
    assert real_tokenizer.decode(trial.answer_ids) == " 48213"


@pytest.mark.real
def test_beginnings_of_essays_are_nearly_as_long_as_asked(real_tokenizer):
    texts = list(beginnings(real_tokenizer, essays(), 330))
    lengths = [len(real_tokenizer(text).input_ids) for text in texts]
    assert len(texts) > 30
    assert max(lengths) <= 330 and sorted(lengths)[len(lengths) // 2] > 290  # the last sentence is cut off
