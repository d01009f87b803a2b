"""Compose a prompt from a context, a needle and a question, and find in it the tokens of the needle and of the
answer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from locos_fast.prompts.chat_template import Around, around_message
from locos_fast.prompts.text_segments import SENTENCE_END
from locos_fast.prompts.trials import Trial

DEPTH_TOLERANCE = 5  # percent of the context by which a needle may miss its depth without a warning


class TokenisedText(NamedTuple):
    """Token ids of a text, special tokens included, and which characters each token stands for.

    offsets   half-open (start, end) characters; equal where a token has no characters, such as an added BOS
    leading   number of special tokens at the beginning
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    leading: int


class Insertion(NamedTuple):
    """A context with the needle in it."""

    text: str
    start: int  # the needle's first character
    depth: float  # percent of the context in front of the needle


def compose(
    tokenizer: Any,
    *,
    context: str,
    needle: str,
    question: str,
    answer: str,
    depth: float | None = None,
    chat_template: bool = False,
    lead: str = "",
    trial_id: str | None = None,
) -> Trial:
    """A trial whose prompt is the context with the needle, a blank line, and the question.

    depth: percent of the context in front of the needle, which is inserted at the sentence boundary before that point;
    None if the context already contains the needle, exactly once. The trial's `depth` is the one that came about.
    chat_template: whether that is a user's message in the tokenizer's chat template, thinking off, as in a scan.
    lead: with which the reply is begun, on a line of its own where there is no template; the answer follows it.
    The answer's ids are those that `continuation` finds; white space around needle, lead and answer is no part of them.

    Warns (UserWarning) if the needle lies more than 5 percent of the context away from the depth that was asked for.
    Raises ValueError, naming the argument, for a text that is empty, no string or not UTF-8, a needle that does not
    occur exactly once or is longer than the context, a depth outside 0..100, a tokenizer without character offsets, and
    one without a chat template that is asked for.
    """
    given = {"context": context, "needle": needle, "question": question, "answer": answer}
    for name, text in (given | {"lead": lead} if lead else given).items():
        check_text(name, text)
    needle, answer, lead = needle.strip(), answer.strip(), lead.strip()
    around = around_message(tokenizer) if chat_template else Around("", "\n" if lead else "")
    placed = _placed(context, needle, depth)
    opening = f"{around.before}{placed.text}\n\n"
    prompt = f"{opening}{question}{around.after}{lead}"
    tokens = tokenise(tokenizer, prompt)
    needle_start = len(around.before) + placed.start
    return Trial(
        prompt_ids=tokens.ids,
        needle_span=_span_of("needle", tokens.offsets, needle_start, needle_start + len(needle)),
        answer_ids=continuation(tokenizer, prompt, tokens.ids, answer),
        question=question,
        needle=needle,
        answer=answer,
        depth=placed.depth,
        length=len(tokens.ids),
        id=trial_id or f"score-{len(tokens.ids)}",
        requested_depth=None if depth is None else float(depth),
        context_sha256=hashlib.sha256(context.encode()).hexdigest(),
        question_span=_span_of("question", tokens.offsets, len(opening), len(opening) + len(question)),
        lead_tokens=sum(end > len(prompt) - len(lead) for _, end in tokens.offsets),
    )


def check_text(name: str, text: Any) -> None:
    """Raises ValueError, naming the argument, unless this is text with something in it that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{name}: expected text, got nothing")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that were not UTF-8 arrive as lone surrogates
        raise ValueError(f"{name}: expected UTF-8 text, got a lone surrogate at character {error.start}") from error


def tokenise(tokenizer: Any, text: str) -> TokenisedText:
    """Tokens of a text: special tokens as the tokenizer adds them, but no EOS at the end and no second BOS.

    An EOS that stands in the text itself stays.
    Raises ValueError for a tokenizer without character offsets and for what is no UTF-8 text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} has no character offsets; a fast tokenizer is needed")
    check_text("text", text)
    encoded = _encode(tokenizer, text, return_offsets_mapping=True)
    ids = _without_added_eos(tokenizer, text, encoded["input_ids"])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    leading = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    return TokenisedText(ids, [(low, high) for low, high in encoded["offset_mapping"]][: len(ids)], leading)


def continuation(tokenizer: Any, prompt: str, ids: list[int], answer: str) -> list[int]:
    """Ids of the answer after the prompt, whose ids are given: those that follow them in the tokenisation of prompt and
    answer together, or those of the answer alone where the prompt's ids are no prefix.

    White space around the answer is taken away; one space is put in front of it unless the prompt ends in white space
    or the answer begins with a special token, such as EOS.
    Raises ValueError for an answer without tokens and for what is no UTF-8 text.
    """
    check_text("answer", answer)
    answer = answer.strip()
    glued = prompt[-1:].isspace() or answer.startswith(tuple(tokenizer.all_special_tokens))
    text = prompt + ("" if glued else " ") + answer
    together = _without_added_eos(tokenizer, text, _encode(tokenizer, text)["input_ids"])
    if len(together) > len(ids) and together[: len(ids)] == ids:
        return together[len(ids) :]
    alone = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not alone:
        raise ValueError("answer: the tokenizer gives it no tokens")
    return alone


def insert_needle(context: str, needle: str, depth: float) -> Insertion:
    """The context with the needle as a sentence of its own.

    It goes to the last sentence boundary before `depth` percent of the characters; 0 is the beginning, 100 the end.
    """
    if isinstance(depth, bool) or not isinstance(depth, Real) or not 0 <= depth <= 100:
        raise ValueError(f"depth: expected percent, 0 to 100, got {depth}")
    if len(needle) > len(context):
        raise ValueError(f"needle: {len(needle)} characters are longer than the context of {len(context)}")
    if needle in context:
        raise ValueError("needle: already in the context; without a depth it is scored where it stands")
    target = len(context) * depth / 100
    boundaries = [0, *(match.end() for match in SENTENCE_END.finditer(context)), len(context)]
    cut = max(boundary for boundary in boundaries if boundary <= target)
    before, after = context[:cut].rstrip(" "), context[cut:].lstrip(" ")
    lead = before if not before or before.endswith("\n") else f"{before} "
    tail = after if not after or after.startswith("\n") else f" {after}"
    return Insertion(f"{lead}{needle}{tail}", len(lead), 100 * cut / len(context))


def _placed(context: str, needle: str, depth: float | None) -> Insertion:
    if depth is None:
        start = _only_occurrence(context, needle)
        return Insertion(context, start, 100 * start / max(len(context) - len(needle), 1))
    placed = insert_needle(context, needle, depth)
    _warn_of_distance(placed.depth, depth)
    return placed


def _warn_of_distance(depth: float, requested: float) -> None:
    if abs(depth - requested) > DEPTH_TOLERANCE:
        warnings.warn(
            f"depth: asked for {requested:g} percent, but the last sentence boundary before it is at {depth:.3g}",
            stacklevel=4,
        )


def _only_occurrence(context: str, needle: str) -> int:
    if len(needle) > len(context):
        raise ValueError(f"needle: {len(needle)} characters are longer than the context of {len(context)}")
    start = context.find(needle)
    if start < 0:
        raise ValueError("needle: not found in the context; give --depth to insert it")
    if context.find(needle, start + 1) >= 0:
        raise ValueError("needle: found more than once in the context; it must be unique")
    return start


def _span_of(name: str, offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The span of tokens that overlap characters start ... end. Raises ValueError, with the text's name, for none."""
    inside = [i for i, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
    if not inside:
        raise ValueError(f"{name}: the tokenizer gives it no tokens")
    return inside[0], inside[-1] + 1


def _encode(tokenizer: Any, text: str, **options: Any) -> Any:
    special = _wants_special_tokens(tokenizer, text)
    return tokenizer(text, add_special_tokens=special, verbose=False, **options)  # not to log that a text is long


def _wants_special_tokens(tokenizer: Any, prompt: str) -> bool:
    """Not where the text, from a chat template say, already begins with BOS: there must not be two."""
    return not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))


def _without_added_eos(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """Some tokenizers end every text with the end-of-sequence token, after which nothing is predicted. One that stands
    in the text is the text's."""
    kept = list(ids)
    if not _ends_of(kept, tokenizer.eos_token_id):
        return kept
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    added = _ends_of(kept, tokenizer.eos_token_id) - _ends_of(own, tokenizer.eos_token_id)
    return kept[: len(kept) - max(added, 0)]


def _ends_of(ids: Sequence[int], eos: int | None) -> int:
    """How many EOS tokens stand at the end."""
    return next((count for count, token in enumerate(reversed(ids)) if token != eos), len(ids))
