"""Compose a prompt from a context, a needle and a question, and find in it the tokens of the needle and of the
answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from locos_fast.prompts.trials import Trial

SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n+")


class TokenisedText(NamedTuple):
    """Token ids of a text, special tokens included, and which characters each token stands for.

    offsets   half-open (start, end) characters; equal where a token has no characters, such as an added BOS
    leading   number of special tokens at the beginning
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    leading: int


def compose(
    tokenizer: Any, *, context: str, needle: str, question: str, answer: str, depth: float | None = None
) -> Trial:
    """A trial whose prompt is the context with the needle, a blank line, and the question.

    depth: percent of the context in front of the needle, which is inserted at the sentence boundary before that point;
    None if the context already contains the needle, exactly once.
    The answer's ids are those that follow the prompt's in the tokenisation of prompt and answer together, or those of
    the answer alone where the prompt's ids are no prefix.

    Raises ValueError, naming the argument, for an empty text, a needle that does not occur exactly once or is longer
    than the context, a depth outside 0..100, and a tokenizer without character offsets.
    """
    for name, text in (("context", context), ("needle", needle), ("question", question), ("answer", answer)):
        if not text.strip():
            raise ValueError(f"{name}: expected text, got nothing")
    needle = needle.strip()
    if depth is None:
        start = _only_occurrence(context, needle)
    else:
        context, start = insert_needle(context, needle, depth)
    prompt = f"{context}\n\n{question}"
    tokens = tokenise(tokenizer, prompt)
    answer_ids = continuation(tokenizer, prompt, tokens.ids, answer)
    return Trial(
        prompt_ids=tokens.ids,
        needle_span=_span_of(tokens.offsets, start, start + len(needle)),
        answer_ids=answer_ids,
        question=question,
        needle=needle,
        answer=answer,
        depth=100 * start / len(context) if depth is None else depth,
        length=len(tokens.ids),
        id=f"score-{len(tokens.ids)}",
    )


def tokenise(tokenizer: Any, text: str) -> TokenisedText:
    """Tokens of a text: special tokens as the tokenizer adds them, except an EOS at the end or a second BOS.

    Raises ValueError for a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} has no character offsets; a fast tokenizer is needed")
    encoded = _encode(tokenizer, text, return_offsets_mapping=True)
    ids = _without_eos(tokenizer, encoded["input_ids"])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    leading = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    return TokenisedText(ids, [(low, high) for low, high in encoded["offset_mapping"]][: len(ids)], leading)


def continuation(tokenizer: Any, prompt: str, ids: list[int], answer: str) -> list[int]:
    """Ids of the answer after the prompt, whose ids are given: those that follow them in the tokenisation of prompt and
    answer together, or those of the answer alone where the prompt's ids are no prefix.

    A space is put between the two unless one of them brings its own.
    Raises ValueError for an answer without tokens.
    """
    space = "" if prompt[-1].isspace() or answer[0].isspace() else " "
    together = _without_eos(tokenizer, _encode(tokenizer, prompt + space + answer)["input_ids"])
    if len(together) > len(ids) and together[: len(ids)] == ids:
        return together[len(ids) :]
    alone = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not alone:
        raise ValueError("answer: the tokenizer gives it no tokens")
    return alone


def insert_needle(context: str, needle: str, depth: float) -> tuple[str, int]:
    """The context with the needle as a sentence of its own, and the needle's first character.

    It goes to the last sentence boundary before `depth` percent of the characters; 0 is the beginning, 100 the end.
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth: expected percent, 0 to 100, got {depth:g}")
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
    return f"{lead}{needle}{tail}", len(lead)


def _only_occurrence(context: str, needle: str) -> int:
    if len(needle) > len(context):
        raise ValueError(f"needle: {len(needle)} characters are longer than the context of {len(context)}")
    start = context.find(needle)
    if start < 0:
        raise ValueError("needle: not found in the context; give --depth to insert it")
    if context.find(needle, start + 1) >= 0:
        raise ValueError("needle: found more than once in the context; it must be unique")
    return start


def _span_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The span of tokens that overlap characters start ... end."""
    inside = [i for i, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
    if not inside:
        raise ValueError("needle: the tokenizer gives it no tokens")
    return inside[0], inside[-1] + 1


def _encode(tokenizer: Any, text: str, **options: Any) -> Any:
    special = _wants_special_tokens(tokenizer, text)
    return tokenizer(text, add_special_tokens=special, verbose=False, **options)  # not to log that a text is long


def _wants_special_tokens(tokenizer: Any, prompt: str) -> bool:
    """Not where the text, from a chat template say, already begins with BOS: there must not be two."""
    return not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))


def _without_eos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Some tokenizers end every text with the end-of-sequence token; nothing is predicted after it."""
    kept = list(ids)
    while kept and kept[-1] == tokenizer.eos_token_id:
        kept.pop()
    return kept
