"""Every token is known by the characters that it touches, and thoughts by their markers."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from locos_fast.prompts.thinking import thinking_marks
from locos_fast.prompts.token_texts import token_texts
from tests.oracles import tiny_tokenizers

TEXT = "The train left Lisbon at noon. Nobody saw it.\n\nIt was late. <think> hm </think> " * 3
WITH_BYTES = {"byte-level": tiny_tokenizers.byte_level, "byte fallback": tiny_tokenizers.byte_fallback}


@pytest.fixture(params=tiny_tokenizers.KINDS | WITH_BYTES, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return (tiny_tokenizers.KINDS | WITH_BYTES)[request.param](TEXT)


@pytest.fixture(params=WITH_BYTES, scope="module")
def bytewise(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return WITH_BYTES[request.param](TEXT)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_the_spans_of_all_tokens_lie_one_behind_the_other_and_cover_the_text(tokenizer) -> None:
    ids = ids_of(tokenizer, "Nobody saw the train. It was late.")
    text, spans = token_texts(tokenizer, ids)
    assert text == tokenizer.decode(ids)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)


@pytest.mark.parametrize("character", "é東🦊")
def test_every_token_with_a_byte_of_a_character_touches_it(bytewise, character: str) -> None:
    ids = ids_of(bytewise, f"at{character}{character}.")
    text, spans = token_texts(bytewise, ids)
    assert text == f"at{character}{character}."
    size = len(character.encode())
    assert spans.count((2, 3)) == spans.count((3, 4)) == size > 1


class Bytes:
    """A tokenizer whose tokens are the given bytes."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, ids: list[int], **_: object) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


def test_a_token_with_bytes_of_two_characters_touches_both() -> None:
    tokenizer = Bytes(b"a \xe6", b"\x9d", b"\xb1\xc3", b"\xa9!", b"", b"\xff", b"b")
    text, spans = token_texts(tokenizer, range(7))
    assert text == "a 東é!\N{REPLACEMENT CHARACTER}b"
    assert spans == [(0, 3), (2, 3), (2, 4), (3, 5), (5, 5), (5, 6), (6, 7)]


def test_an_unfinished_character_at_the_end_is_left_out(bytewise) -> None:
    ids = ids_of(bytewise, "at noon 東東")
    text, spans = token_texts(bytewise, ids[:-1])
    assert text == "at noon 東"
    assert [span for span in spans[-2:] if span[0] < span[1]] == []
    assert spans[-3][1] == len(text)


def test_no_tokens_are_no_text(tokenizer) -> None:
    assert token_texts(tokenizer, []) == ("", [])


def test_thoughts_are_found_in_the_text_of_every_vocabulary(bytewise) -> None:
    thought, said = ids_of(bytewise, "It <think>saw\n\nit</think>"), ids_of(bytewise, "\n\nnoon.")
    marks = thinking_marks(bytewise, thought + said)
    text, spans = token_texts(bytewise, thought)
    start = text.index("<think>")
    assert marks == [end > start for _, end in spans] + [False] * len(said)


def test_thoughts_whose_beginning_is_not_there_began_with_the_reply(bytewise) -> None:
    thought, said = ids_of(bytewise, "It was late.</think>"), ids_of(bytewise, "\n\nnoon.")
    assert thinking_marks(bytewise, thought + said) == [True] * len(thought) + [False] * len(said)


def test_thoughts_that_do_not_end_go_on(bytewise) -> None:
    ids = ids_of(bytewise, "<think>It was late.")
    assert thinking_marks(bytewise, ids) == [True] * len(ids)
    prompt = ids_of(bytewise, "It was late.<think>\n\n")
    assert thinking_marks(bytewise, ids_of(bytewise, "It saw"), prompt) == [True] * len(ids_of(bytewise, "It saw"))
