"""The tiny tokenizers with a chat template, for prompts made of several texts."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerFast

from tests.oracles import tiny_tokenizers

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>\n{{ m.content }}\n{% endfor %}"
    "<reply>{% if enable_thinking %}<think>{% endif %}\n"
)


def trained(kind: str, *texts: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind of `tiny_tokenizers.KINDS` that knows the words of the texts and of the template."""
    return tiny_tokenizers.KINDS[kind](" ".join((*texts, "one <user> <reply>")), chat_template=TEMPLATE)


def squeezed(text: str) -> str:
    """Without white space, of which some tokenizers lose or add some."""
    return re.sub(r"\s+", "", text)
