"""What a tokenizer's chat template puts around a user's message."""

from __future__ import annotations

from typing import Any, NamedTuple

HERE = "<<<HERE>>>"  # stands for the message while the template is cut in two


class Around(NamedTuple):
    """Text before and behind a user's message, up to where the reply begins."""

    before: str
    after: str


def around_message(tokenizer: Any) -> Around:
    """What a chat with one message has around it, thinking off.

    Raises ValueError for a tokenizer without a chat template, and for one that does not keep the message as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat template: this tokenizer has none; --no-chat-template asks without one")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": HERE}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, found, after = whole.partition(HERE)
    if not found:
        raise ValueError("chat template: it does not keep the user's message as it is")
    return Around(before, after)
