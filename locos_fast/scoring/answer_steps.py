"""Which tokens of a generated reply spell the answer, so that they are the ones to score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from locos_fast.prompts.compose import check_text
from locos_fast.prompts.thinking import thinking_marks
from locos_fast.prompts.token_texts import token_texts


def find_answer_steps(
    tokenizer: Any,
    generated_ids: Sequence[int],
    answer: str,
    answer_ids: Sequence[int] | None = None,
    *,
    thinking: Sequence[bool] | None = None,
) -> list[int]:
    """Indices in `generated_ids` of the tokens that spell the answer where it first occurs, increasing; empty if it
    does not.

    First the exact ids are looked for: `answer_ids`, those of the answer behind the prompt, then those of the answer
    alone, then those of the answer behind a space; they win over an earlier place where other tokens spell the answer.
    Else the text is, without regard to case, and every token that touches a character of it is a step: also one with a
    space in front or a stop behind, and each of those that only together spell one character. (As the public code of
    LOCOS does, but there each token is decoded alone, so that an answer with a character of several tokens is not
    found.)

    thinking: which of the tokens are thought and not said, as `Generated.thinking` tells; by default those of the
    thinking blocks that are found in the text. They are not searched, and no answer reaches across them.
    Raises ValueError for an answer that is no text, and for marks that are not one for each token.
    """
    check_text("answer", answer)
    answer, ids = answer.strip(), [int(token) for token in generated_ids]
    thought = thinking_marks(tokenizer, ids) if thinking is None else list(thinking)
    if len(thought) != len(ids):
        raise ValueError(f"thinking: expected {len(ids)} marks, one for each token, got {len(thought)}")
    said = [list(run) for is_thought, run in groupby(range(len(ids)), key=thought.__getitem__) if not is_thought]
    runs = [[ids[i] for i in run] for run in said]
    for wanted in _spellings(tokenizer, answer, answer_ids):
        for places, run in zip(said, runs, strict=True):
            if (start := _first(run, wanted)) is not None:
                return places[start : start + len(wanted)]
    for places, run in zip(said, runs, strict=True):
        if steps := _touching(tokenizer, run, answer):
            return [places[step] for step in steps]
    return []


def _spellings(tokenizer: Any, answer: str, answer_ids: Sequence[int] | None) -> list[list[int]]:
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, f" {answer}")]
    unknown = getattr(tokenizer, "unk_token_id", None)
    spelled = [[int(token) for token in ids] for ids in ([] if answer_ids is None else answer_ids, *alone)]
    return [ids for ids in spelled if ids and unknown not in ids]  # an unknown token could stand for any text


def _first(ids: list[int], wanted: list[int]) -> int | None:
    return next((i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted), None)


def _touching(tokenizer: Any, ids: list[int], answer: str) -> list[int]:
    """The tokens that touch the first occurrence of the answer in the text of the ids."""
    text, spans = token_texts(tokenizer, ids)
    folded, places = _folded(text)
    wanted, _ = _folded(answer)
    hit = folded.find(wanted)
    if hit < 0:
        return []
    start, end = places[hit], places[hit + len(wanted) - 1] + 1
    return [step for step, (low, high) in enumerate(spans) if low < end and high > start and high > low]


def _folded(text: str) -> tuple[str, list[int]]:
    """The text without case, and for each of its characters the index in `text` of the one that it is from: some
    characters, as "ß", become two."""
    pieces = [character.casefold() for character in text]
    return "".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]
