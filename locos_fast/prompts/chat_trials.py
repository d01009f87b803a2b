"""Trials in a model's chat template, the reply begun with a lead so that its next tokens are the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from locos_fast.prompts.compose import SENTENCE_END, continuation, insert_needle, tokenise
from locos_fast.prompts.trials import Trial

CHARACTERS_PER_TOKEN = 12  # more than any ordinary prose has


def compose_chat(
    tokenizer: Any, *, context: str, needle: str, question: str, lead: str, answer: str, depth: float, id: str
) -> Trial:
    """A trial whose prompt is a chat: the user gives the context with the needle, a blank line, and the question; the
    reply has begun with `lead`.

    depth: percent of the context in front of the needle, see `compose`. The answer follows the lead after a space.
    Raises ValueError, naming the argument, for what `compose` refuses, and for a tokenizer without a chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} has no chat template")
    inserted = insert_needle(context, needle, depth)
    message = {"role": "user", "content": f"{inserted.text}\n\n{question}"}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) + lead
    start = prompt.index(needle)
    tokens = tokenise(tokenizer, prompt)
    inside = [i for i, (low, high) in enumerate(tokens.offsets) if start < high and low < start + len(needle)]
    return Trial(
        prompt_ids=tokens.ids,
        needle_span=(inside[0], inside[-1] + 1),
        answer_ids=continuation(tokenizer, prompt, tokens.ids, answer),
        question=question,
        needle=needle,
        answer=answer,
        depth=inserted.depth,
        requested_depth=depth,
        length=len(tokens.ids),
        id=id,
    )


def beginnings(tokenizer: Any, texts: Iterable[str], tokens: int) -> Iterator[str]:
    """The first whole sentences of each text that make at most `tokens` tokens; shorter texts are left out."""
    for text in texts:
        offsets = tokenise(tokenizer, text[: tokens * CHARACTERS_PER_TOKEN]).offsets
        if len(offsets) <= tokens:
            continue
        room = text[: offsets[tokens][0]]
        ends = [match.end() for match in SENTENCE_END.finditer(room)]
        if ends:
            yield room[: ends[-1]].strip()
