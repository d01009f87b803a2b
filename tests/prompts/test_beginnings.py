"""The beginnings of texts: whole sentences, as many tokens as were asked for."""

import pytest

import locos_fast
from locos_fast.planted.vocabulary import build_tokenizer
from locos_fast.prompts.beginnings import beginnings
from locos_fast.prompts.haystacks import essays


def test_beginnings_are_whole_sentences_of_at_most_so_many_tokens():
    tokenizer = build_tokenizer(max_length=1000)
    word = "the"
    text = " ".join([*[word] * 4, ".", *[word] * 6, ".", *[word] * 9, "."])
    assert list(beginnings(tokenizer, [text, word], 13)) == [" ".join([*[word] * 4, ".", *[word] * 6, "."])]


@pytest.fixture(scope="module")
def real_tokenizer():
    return locos_fast.load("smollm2", device="cpu")[1]


@pytest.mark.real
def test_beginnings_of_essays_are_nearly_as_long_as_asked(real_tokenizer):
    texts = list(beginnings(real_tokenizer, essays(), 330))
    lengths = [len(real_tokenizer(text).input_ids) for text in texts]
    assert len(texts) > 30
    assert max(lengths) <= 330 and sorted(lengths)[len(lengths) // 2] > 290  # the last sentence is cut off
