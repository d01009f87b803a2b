"""A prompt's tokens are the text's own: nothing the tokenizer adds is scored, nothing the text says is lost."""

from __future__ import annotations

import hashlib
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from locos_fast.prompts.compose import compose, continuation, insert_needle, tokenise

BOS, EOS = "<s>", "<|im_end|>"
NEEDLE = "The blue key opens the north gate."
CONTEXT = "Rain fell on the hill. The river was wide. A bird sang! Night came early."
TEMPLATES = {"adds nothing": "$A", "adds BOS": f"{BOS} $A", "adds EOS": f"$A {EOS}", "adds both": f"{BOS} $A {EOS}"}


@pytest.fixture(scope="module", params=TEMPLATES.values(), ids=TEMPLATES)
def tokenizer(request):
    """Byte-level BPE, as of Llama 3 or SmolLM, that adds what its template says."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([CONTEXT, NEEDLE] * 3, trainer)
    pairs = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = TemplateProcessing(single=request.param, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def trial_of(tokenizer, **changes):
    given = {"context": CONTEXT, "needle": NEEDLE, "question": "What opens the gate?", "answer": "The blue key"}
    return compose(tokenizer, **(given | {"depth": 32} | changes))


def own(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_answer_that_is_eos_is_scored_as_eos(tokenizer):
    assert trial_of(tokenizer, answer=EOS).answer_ids == [tokenizer.eos_token_id]


def test_an_answer_keeps_the_eos_it_ends_with(tokenizer):
    assert trial_of(tokenizer, answer=f"The key{EOS}").answer_ids == own(tokenizer, f" The key{EOS}")


def test_a_prompt_keeps_the_eos_it_ends_with(tokenizer):
    trial = trial_of(tokenizer, question=f"What opens it?{EOS}{EOS}")
    eos = tokenizer.eos_token_id
    assert trial.prompt_ids[-3] != eos
    assert trial.prompt_ids[-2:] == [eos, eos]
    assert trial.answer_ids == own(tokenizer, " The blue key")


def test_an_eos_that_the_tokenizer_adds_is_neither_in_prompt_nor_answer(tokenizer):
    trial = trial_of(tokenizer)
    assert tokenizer.eos_token_id not in [*trial.prompt_ids, *trial.answer_ids]
    assert tokenizer.decode(trial.prompt_ids).removeprefix(BOS).endswith("gate?")


@pytest.mark.parametrize("answer", ["  The blue key", "The blue key  \n", "\tThe blue key"])
def test_white_space_around_the_answer_is_no_part_of_it(tokenizer, answer):
    assert trial_of(tokenizer, answer=answer).answer_ids == trial_of(tokenizer).answer_ids
    assert trial_of(tokenizer, answer=answer).answer == "The blue key"


def test_a_prompt_that_ends_in_white_space_gets_no_other(tokenizer):
    prompt = "assistant\n"
    assert continuation(tokenizer, prompt, tokenise(tokenizer, prompt).ids, " key") == own(tokenizer, "key")


# --- where the needle goes

SCRIPTS = {
    "Chinese": "雨落在山上。河很宽！鸟在唱歌吗？夜来得早。" * 4,
    "Japanese": "雨が降った。川は広い。「鳥が鳴いた。」夜が来た。" * 4,
    "Hindi": "बारिश हुई। नदी चौड़ी थी। चिड़िया गाई। रात आई। " * 4,
    "Arabic": "هل سقط المطر؟ هل كان النهر واسعا؟ هل غنى الطائر؟ " * 4,
    "curly quotes": "“Rain fell.” “The river was wide.” ‘A bird sang.’ " * 4,
    "guillemets": "«Il pleut.» «Le fleuve est large…» «Un oiseau chante.» " * 4,
}


@pytest.mark.parametrize("context", SCRIPTS.values(), ids=SCRIPTS)
def test_sentences_end_in_every_script(context):
    placed = insert_needle(context, NEEDLE, 60)
    assert placed.text[placed.start :].startswith(NEEDLE)
    assert 45 < placed.depth <= 60


WRAPPED = """The mind is where
something small huddles of
addicts do outside.
The rest
of it sleeps all day.

A last
word"""


@pytest.mark.parametrize("depth", range(0, 101, 5))
def test_a_needle_never_stands_inside_a_sentence_of_wrapped_text(depth):
    placed = insert_needle(WRAPPED, "NEEDLE.", depth)
    before = placed.text[: placed.start].rstrip()
    assert before in ("", WRAPPED) or before.endswith((".", "day."))


def test_the_depth_is_the_one_that_came_about(tokenizer):
    trial = trial_of(tokenizer, depth=60)
    boundary = CONTEXT.index(" A bird")
    assert trial.depth == pytest.approx(100 * boundary / len(CONTEXT))
    assert trial.requested_depth == 60.0


@pytest.mark.parametrize(("needle_at", "depth"), [(0, 0), (1, 100)])
def test_the_depth_of_a_needle_that_is_there_runs_from_0_to_100(tokenizer, needle_at, depth):
    context = (f"{NEEDLE} {CONTEXT}", f"{CONTEXT} {NEEDLE}")[needle_at]
    trial = trial_of(tokenizer, context=context, depth=None)
    assert trial.depth == pytest.approx(depth)
    assert trial.requested_depth is None


def test_a_depth_that_is_missed_is_warned_of(tokenizer):
    with pytest.warns(
        UserWarning, match="depth: asked for 90 percent, but the last sentence boundary before it is at 0"
    ):
        trial = trial_of(tokenizer, context="no stop " * 20, depth=90)
    assert (trial.depth, trial.requested_depth) == (0.0, 90.0)


def test_a_depth_that_is_met_is_not_warned_of(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial_of(tokenizer, context="Rain. " * 100, depth=90)


# --- what is refused, and what is remembered


@pytest.mark.parametrize("argument", ["context", "needle", "question", "answer"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\udcff", "expected UTF-8 text, got a lone surrogate at character 1"),
        (3, "expected text, got int"),
        (" \n", "got nothing"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tokenizer, argument, text, message):
    with pytest.raises(ValueError, match=rf"^{argument}: .*{message}"):
        trial_of(tokenizer, **{argument: text})


@pytest.mark.parametrize("depth", ["50", True, float("nan"), -1, 101])
def test_a_depth_that_is_no_percentage_is_refused(tokenizer, depth):
    with pytest.raises(ValueError, match="depth: expected percent, 0 to 100"):
        trial_of(tokenizer, depth=depth)


def test_a_trial_describes_itself_with_the_hash_of_its_context(tokenizer):
    described = trial_of(tokenizer, depth=100).describe()
    assert described["context_sha256"] == hashlib.sha256(CONTEXT.encode()).hexdigest()
    assert (described["needle"], described["answer"], described["depth"]) == (NEEDLE, "The blue key", 100.0)


@pytest.mark.real
def test_the_real_tokenizer_keeps_the_eos_that_was_written():
    from locos_fast.models.loading import ModelSource

    smollm = ModelSource("smollm2").tokenizer()
    eos = [smollm.eos_token_id]
    assert trial_of(smollm, answer=EOS).answer_ids == eos
    assert trial_of(smollm, answer=f"The key{EOS}").answer_ids == own(smollm, " The key") + eos
    trial = trial_of(smollm, question=f"What opens it?{EOS}")
    assert trial.prompt_ids[-1:] == eos
    assert trial.answer_ids == own(smollm, " The blue key")
