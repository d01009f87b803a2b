"""Cutting a text's tokens: partitions whatever the tokens are, sentences and paragraphs where a reader sees them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locos_fast.prompts.text_segments import cover, cut, parse_rule, text_of

PIECES = st.sampled_from(["a", "word", " ", "  ", ".", "!", "?", '"', ")", "\n", "\n\n", "\r\n", "\t", "é", "語", "🙂"])
TEXTS = st.lists(PIECES, max_size=40).map("".join)
RULES = st.sampled_from(["sentences", "paragraphs", 1, 2, 7, 1000])


@st.composite
def tokenised(draw):
    """A text and how a tokenizer could have cut it: characters left out, tokens without any, several for one."""
    text = draw(TEXTS)
    leading = draw(st.integers(0, 2))
    offsets = [(0, 0)] * leading
    position = 0
    while position < len(text):
        end = min(position + draw(st.integers(1, 5)), len(text))
        kind = draw(st.sampled_from(["plain", "plain", "plain", "skipped", "empty", "doubled"]))
        if kind == "empty":
            offsets.append(draw(st.sampled_from([(0, 0), (position, position)])))
        elif kind != "skipped":
            offsets += [(position, end)] * (2 if kind == "doubled" else 1)
        position = end
    return text, offsets, leading


@st.composite
def any_offsets(draw):
    """Offsets in no order at all."""
    text = draw(TEXTS)
    ends = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(lambda pair: tuple(sorted(pair)))
    offsets = draw(st.lists(ends, max_size=30))
    return text, offsets, draw(st.integers(0, len(offsets)))


@given(st.one_of(tokenised(), any_offsets()), RULES)
def test_every_token_lies_in_exactly_one_segment(case, rule):
    text, offsets, leading = case
    spans = cut(text, offsets, rule, leading=leading)
    assert [token for start, end in spans for token in range(start, end)] == list(range(len(offsets)))
    assert all(start < end for start, end in spans)
    tokens = len(offsets)
    assert cover(spans, tokens) == (len(spans), tokens, tokens, 0, 0)


@given(tokenised(), RULES)
def test_leading_special_tokens_are_a_segment_of_their_own(case, rule):
    text, offsets, leading = case
    spans = cut(text, offsets, rule, leading=leading)
    assert not leading or spans[0] == (0, leading)


@given(tokenised(), st.sampled_from(["sentences", "paragraphs"]))
def test_no_sentence_or_paragraph_is_blank(case, rule):
    text, offsets, leading = case
    spans = cut(text, offsets, rule, leading=leading)[bool(leading) :]
    assert len(spans) == 1 or all(text_of(text, offsets, span).strip() for span in spans)


@given(any_offsets(), st.lists(st.tuples(st.integers(0, 29), st.integers(1, 30)), min_size=1, max_size=5))
def test_cover_counts_tokens(case, pairs):
    tokens = 30
    spans = [(start, end) for start, end in pairs if start < end]
    depth = [sum(start <= token < end for start, end in spans) for token in range(tokens)]
    counted = (len(spans), tokens, sum(map(bool, depth)), depth.count(0), sum(count > 1 for count in depth))
    assert cover(spans, tokens) == counted


def words(text: str) -> list[tuple[int, int]]:
    """Offsets as of a byte-level tokenizer: a word with the space before it, punctuation, runs of newlines."""
    return [match.span() for match in re.finditer(r" ?\w+|[^\w\s]|[^\S\n]*\n+|\s", text)]


def pieces(text: str, rule: str | int, leading: int = 0) -> list[str]:
    offsets = [(0, 0)] * leading + words(text)
    return [text_of(text, offsets, span) for span in cut(text, offsets, rule, leading=leading)]


def test_sentences_end_at_stops_before_white_space_and_at_blank_lines():
    text = 'One is 3.5 wide. "Two?" Three!\nFour\n\nFive (six.) Seven'
    assert pieces(text, "sentences") == [
        "One is 3.5 wide.",
        ' "Two?"',
        " Three!",
        "\nFour\n\n",
        "Five (six.)",
        " Seven",
    ]


def test_paragraphs_end_at_blank_lines_and_keep_their_indentation():
    text = "One. Two.\nThree\n\n  Four\n \t\r\n\nFive\r\n\r\nSix"
    assert pieces(text, "paragraphs") == ["One. Two.\nThree\n\n", "  Four\n \t\r\n\n", "Five\r\n\r\n", "Six"]


@pytest.mark.parametrize("rule", ["sentences", "paragraphs"])
def test_white_space_at_both_ends_joins_the_text(rule):
    assert pieces(" \n\n\nText\n\n \n\n", rule) == [" \n\n\nText\n\n \n\n"]


def test_white_space_after_special_tokens_does_not_join_them():
    text = "\n\nText"
    offsets = [(0, 0), *words(text)]
    assert cut(text, offsets, "sentences", leading=1) == [(0, 1), (1, len(offsets))]


def test_a_token_across_a_boundary_belongs_where_it_starts():
    text = "One. Two."
    assert cut(text, [(0, 3), (3, 6), (6, 8), (8, 9)], "sentences") == [(0, 2), (2, 4)]


def test_a_token_without_characters_stays_with_the_one_before_it():
    text = "One. Two."
    offsets = [(0, 3), (3, 4), (0, 0), (4, 8), (8, 9), (9, 9)]
    assert cut(text, offsets, "sentences") == [(0, 3), (3, 6)]


def test_bytes_of_one_character_stay_together():
    text = "A 🙂. B"
    offsets = [(0, 1), (2, 3), (2, 3), (2, 3), (2, 3), (3, 4), (5, 6)]
    assert cut(text, offsets, "sentences") == [(0, 6), (6, 7)]


def test_blocks_count_from_the_first_token_that_is_not_special():
    offsets = [(0, 0), *((i, i + 1) for i in range(8))]
    assert cut("abcdefgh", offsets, 3, leading=1) == [(0, 1), (1, 4), (4, 7), (7, 9)]
    assert cut("abcdefgh", offsets, 100) == [(0, 9)]


def test_spans_given_by_hand_are_kept_as_they_are():
    offsets = [(i, i + 1) for i in range(8)]
    spans = [(4, 6), (0, 2), (1, 3)]
    assert cut("abcdefgh", offsets, spans, leading=1) == spans
    line = "3 segments cover 5 of 8 tokens; 3 tokens lie in no segment, 1 in more than one"
    assert str(cover(spans, 8)) == line
    with pytest.raises(ValueError, match="segments: expected spans inside the prompt's 8 tokens, got 7:9"):
        cut("abcdefgh", offsets, [(7, 9)])


def test_rules_are_read():
    assert [parse_rule(rule) for rule in ("sentences", " paragraphs", "12")] == ["sentences", "paragraphs", 12]
    assert parse_rule("3:5, 0:4") == [(3, 5), (0, 4)]


@pytest.mark.parametrize(
    "rule", ["", "words", "0", "-3", "1.5", "3:", ":3", "5:5", "6:5", "1:2,", "1:2,x", "-1:2", "1-2"]
)
def test_other_rules_are_refused(rule):
    with pytest.raises(ValueError, match=r"^segments: expected"):
        parse_rule(rule)
