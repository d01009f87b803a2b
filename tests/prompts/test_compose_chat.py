"""Prompts in a chat template, the reply begun: the needle is where the span says, the answer goes on after the lead."""

from __future__ import annotations

from typing import Any

import pytest

import locos_fast
from locos_fast.models.loading import ModelSource
from locos_fast.planted.vocabulary import build_tokenizer
from locos_fast.prompts.compose import compose
from locos_fast.prompts.needle_prompt import Composer, Fact, Haystack
from tests.prompts.test_compose import BOS, CONTEXT, NEEDLE, tokenizer, trial_of  # noqa: F401  (a fixture)

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}\n{% endfor %}"
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
CHAT = TEMPLATE + "{% if add_generation_prompt %}<|assistant|>\n" + THINKING + "{% endif %}"
LEAD = "The gate is opened by"


@pytest.fixture
def chat(tokenizer: Any) -> Any:  # noqa: F811
    tokenizer.chat_template = CHAT
    return tokenizer


def text(tokenizer: Any, trial: locos_fast.Trial, span: tuple[int, int]) -> str:  # noqa: F811
    return tokenizer.decode(trial.prompt_ids[slice(*span)])


@pytest.mark.parametrize("depth", [0, 32, 100])
def test_context_and_question_are_one_message_and_the_reply_has_begun(chat: Any, depth: float) -> None:
    trial = trial_of(chat, depth=depth, chat_template=True, lead=LEAD)
    prompt = chat.decode(trial.prompt_ids)
    assert prompt.startswith(f"{BOS}<|user|>\n") and prompt.count(BOS) == 1
    assert prompt.endswith(f"\n\nWhat opens the gate?\n<|assistant|>\n<think>\n\n</think>\n\n{LEAD}")
    assert text(chat, trial, trial.needle_span).strip() == NEEDLE
    assert text(chat, trial, trial.question_span).strip() == "What opens the gate?"
    assert text(chat, trial, (trial.length - trial.lead_tokens, trial.length)).strip() == LEAD
    assert chat.decode(trial.answer_ids) == " The blue key"


def test_a_needle_that_stands_in_the_context_is_found_behind_the_template(chat: Any) -> None:
    whole = f"{CONTEXT} {NEEDLE} It was late."
    trial = trial_of(chat, context=whole, depth=None, chat_template=True)
    assert text(chat, trial, trial.needle_span).strip() == NEEDLE
    assert trial.depth == pytest.approx(100 * (len(CONTEXT) + 1) / (len(whole) - len(NEEDLE)))
    assert trial.lead_tokens == 0


def test_a_needle_that_the_template_repeats_is_the_one_in_the_context(chat: Any) -> None:
    chat.chat_template = f"{{{{ bos_token }}}}You know this: {NEEDLE}\n" + CHAT.removeprefix("{{ bos_token }}")
    trial = trial_of(chat, depth=100, chat_template=True)
    assert text(chat, trial, trial.needle_span).strip() == NEEDLE
    assert trial.needle_span[0] > trial.length // 2


def test_without_a_template_the_lead_stands_on_its_own_line(tokenizer: Any) -> None:  # noqa: F811
    trial = trial_of(tokenizer, lead=f"  {LEAD} ")
    assert tokenizer.decode(trial.prompt_ids).endswith(f"\n\nWhat opens the gate?\n{LEAD}")
    assert text(tokenizer, trial, trial.question_span).strip() == "What opens the gate?"
    assert text(tokenizer, trial, (trial.length - trial.lead_tokens, trial.length)).strip() == LEAD


def test_nothing_changes_for_who_asks_for_neither(chat: Any) -> None:
    trial = trial_of(chat)
    assert chat.decode(trial.prompt_ids).removeprefix(BOS).startswith("Rain fell")
    assert chat.decode(trial.prompt_ids).endswith("\n\nWhat opens the gate?")
    assert (trial.lead_tokens, trial.id) == (0, f"score-{trial.length}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": True}, "chat template: this tokenizer has none; --no-chat-template asks without one"),
        ({"lead": " \n"}, "lead: expected text, got nothing"),
        ({"lead": "\udce9"}, "lead: expected UTF-8 text"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    words = {"context": "a . b .", "needle": "c .", "question": "who", "answer": "d", "depth": 0}
    with pytest.raises(ValueError, match=message):
        compose(build_tokenizer(max_length=100), **words | changes)


def test_a_template_that_changes_the_message_is_refused(chat: Any) -> None:
    chat.chat_template = "{{ messages[0]['content'] | lower }}"
    with pytest.raises(ValueError, match="does not keep the user's message"):
        trial_of(chat, chat_template=True)


@pytest.mark.real
@pytest.mark.parametrize("chat_template", [True, False])
def test_a_scan_puts_the_same_text_together(chat_template: bool) -> None:
    """Tokens may differ where a scan joins pieces that are tokenised each on its own; the text may not."""
    tokenizer = ModelSource("smollm2").tokenizer()  # noqa: F811
    fact = Fact("0", "The magic number is 48213.", "What is the magic number?", "48213", lead="The magic number is")
    haystack = Haystack.of(tokenizer, " ".join([CONTEXT] * 9))
    scanned = Composer(tokenizer, chat_template=chat_template).compose(
        haystack, [fact], [50], length=120, trial_id="scan"
    )
    context = text(tokenizer, scanned, (0, scanned.length)).partition(f"\n\n{fact.question}")[0]
    if chat_template:
        context = context.rpartition("<|im_start|>user\n")[2]
    own = compose(
        tokenizer,
        context=context,
        needle=fact.needle,
        question=fact.question,
        answer=fact.answer,
        chat_template=chat_template,
        lead=fact.lead,
    )
    assert tokenizer.decode(own.prompt_ids) == tokenizer.decode(scanned.prompt_ids)
    assert (own.answer_ids, own.lead_tokens) == (scanned.answer_ids, scanned.lead_tokens)
    for span in ("needle_span", "question_span"):
        spans = getattr(own, span), getattr(scanned, span)
        assert len({text(tokenizer, trial, s).strip() for trial, s in zip((own, scanned), spans, strict=True)}) == 1
