"""Greedy replies are those of model.generate, from whatever beginning, and end where the rules say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import OpenAIGPTConfig, PreTrainedModel

from locos_fast import score_tokens
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.generation import Generated, StopRules, generate_greedily
from locos_fast.models.prefix_cache import PrefixCache, check_continues
from locos_fast.scoring.head_scores import ARRAYS
from tests.oracles import tiny_models
from tests.oracles.architecture_models import FAMILIES, build
from tests.oracles.further_families import GPT
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import WINDOW, Family, construct, tokens

LENGTH, NEW = 3 * WINDOW + 4, WINDOW + 3  # the prompt is beyond windows and chunks, and the reply leaves one behind
PROMPT = tokens(LENGTH).tolist()
VARIED = ("qwen3", "mistral", "olmo3", "llama4", "gpt_oss", "gemma4", "qwen3_next", "deepseek_v3", "gpt2")


class Words:
    """A tokenizer whose tokens are the given texts; the rest are letters."""

    eos_token_id = None

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(self.texts[i] if i < len(self.texts) else "x" for i in ids)


ENDLESS = StopRules(Words())


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def model_of(family: str) -> PreTrainedModel:
    attention = "sdpa" if "sdpa" in FAMILIES[family].implementations else "eager"
    return build(family, attention, dtype=torch.float32)


def by_transformers(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    return model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()


def without_cache() -> PreTrainedModel:
    settings = {**GPT, "tie_word_embeddings": False, **dict.fromkeys(("bos_token_id", "eos_token_id"))}
    return construct(Family(OpenAIGPTConfig, settings), "eager", seed=9)  # one whose reply varies


# --- the tokens


@pytest.mark.parametrize("family", VARIED)
def test_the_reply_is_that_of_transformers_and_the_same_from_every_beginning(family: str) -> None:
    model = model_of(family)
    expected = by_transformers(model, PROMPT)
    assert len(set(expected)) > 2  # or much could be wrong and not show
    assert generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=NEW).ids == expected
    prefix = PrefixCache(model)
    for end in (2, LENGTH - WINDOW, LENGTH - 1):
        prefix.extend(torch.tensor([PROMPT[prefix.tokens : end]]))
        for _ in range(2):
            reply = generate_greedily(model, PROMPT, prefix=prefix, stop=ENDLESS, max_new_tokens=NEW)
            assert reply.ids == expected and reply.reason == "token limit"


@pytest.mark.parametrize("family", ["qwen3", "olmo3", "gemma4"])
def test_the_beginning_is_put_back(family: str) -> None:
    model = model_of(family)
    prefix = PrefixCache(model)
    prefix.extend(torch.tensor([PROMPT[: LENGTH - 5]]))
    ids = torch.tensor([[*PROMPT, 1, 2]])

    def scores() -> list:
        found = score_tokens(model, ids, (3, 6), [LENGTH, LENGTH + 1], prefix=prefix)
        return [torch.from_numpy(getattr(found, name)).nan_to_num() for name in ARRAYS]

    before = scores()
    generate_greedily(model, PROMPT, prefix=prefix, stop=ENDLESS, max_new_tokens=NEW)
    assert all(map(torch.equal, before, scores()))
    with pytest.raises(RuntimeError, match="decode"):
        generate_greedily(model, PROMPT, prefix=prefix, stop=StopRules(Failing()))
    assert prefix.ids == PROMPT[: LENGTH - 5]
    assert all(map(torch.equal, before, scores()))


class Failing(Words):
    def decode(self, ids: Sequence[int], **_: object) -> str:
        if len(ids) == 1:
            raise RuntimeError("decode")
        return ""


def test_a_model_without_a_cache_is_run_whole() -> None:
    model = without_cache()
    with pytest.raises(UnsupportedModelError, match="takes no cache"):
        PrefixCache(model)
    expected = by_transformers(model, PROMPT)
    assert len(set(expected)) > 2
    assert generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=NEW).ids == expected


def test_keys_that_depend_on_the_length_are_those_of_the_length() -> None:
    """Each token is what a forward pass on all before it says."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LENGTH}
    model = tiny_models.build("qwen3", max_position_embeddings=192, rope_parameters=rope)
    ids = generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=NEW).ids
    whole = list(PROMPT)
    for token in ids:
        assert token == int(model(torch.tensor([whole]), use_cache=False).logits[0, -1].argmax())
        whole.append(token)


def test_the_attention_implementation_is_never_touched_and_no_position_is_computed_twice() -> None:
    model = model_of("qwen3")
    prefix = PrefixCache(model)
    prefix.extend(torch.tensor([PROMPT[:20]]))
    fed, used = [], []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    model.get_decoder().register_forward_pre_hook(lambda *_: used.append(model.config._attn_implementation))
    generate_greedily(model, PROMPT, prefix=prefix, stop=ENDLESS, max_new_tokens=5)
    assert fed == [LENGTH - 20, 1, 1, 1, 1]
    assert set(used) == {"sdpa"}


def test_a_long_prompt_runs_in_chunks_and_gives_the_same() -> None:
    model, widths = model_of("qwen3"), []
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: (widths.append(x.shape[1]), forward(x))[1]
    expected = generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=NEW, token_chunk=10)  # shown once: whole
    widths.clear()
    assert generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=NEW, token_chunk=10) == expected
    assert widths == [10, 10, LENGTH - 20] + [1] * (NEW - 1)
    assert generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=NEW, token_chunk=None) == expected


# --- where it ends


def reply(tokenizer: Words, script: list[int], prompt: Sequence[int] = (30, 30), **rules: object) -> Generated:
    """What becomes of a reply whose tokens are given."""
    limit = rules.pop("max_new_tokens", 50)
    return generate_greedily(saying(script), list(prompt), stop=StopRules(tokenizer, **rules), max_new_tokens=limit)


def saying(script: list[int]) -> PreTrainedModel:
    """A model that says what it is told to."""
    model, said = model_of("qwen3"), iter(script)
    check_continues(model)  # now: it runs the model, once

    def say(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(logits)
        chosen[..., next(said)] = 1.0
        return chosen

    model.lm_head.register_forward_hook(say)
    return model


def test_a_stop_token_ends_the_reply_and_is_no_part_of_it() -> None:
    assert reply(Words(), [5, 6, 7, 8], ids=frozenset({7})) == Generated([5, 6], "stop token", [False, False])
    assert reply(Words(), [7], ids=frozenset({7})) == Generated([], "stop token", [])


def test_the_limit_counts_tokens() -> None:
    assert reply(Words(), [5, 6, 7, 8], max_new_tokens=3) == Generated([5, 6, 7], "token limit", [False] * 3)


TEXTS = ("Paris", "\n", "\n\n", ".\n", " ", "\nRome", "Rome\nis", "\n.\n", "é\n")
PARIS, NEWLINE, BLANK, STOP, SPACE, NEWLINE_ROME, ROME_NEWLINE, LINES, ACCENT = range(len(TEXTS))


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        ([PARIS, NEWLINE], [PARIS]),
        ([PARIS, BLANK], [PARIS]),
        ([PARIS, SPACE, NEWLINE], [PARIS, SPACE]),
        ([PARIS, STOP], [PARIS, STOP]),  # the stop was said
        ([NEWLINE, BLANK, SPACE, PARIS, NEWLINE], [NEWLINE, BLANK, SPACE, PARIS]),  # blank lines are no reply
        ([NEWLINE_ROME, PARIS, NEWLINE], [NEWLINE_ROME, PARIS]),
        ([PARIS, NEWLINE_ROME], [PARIS]),
        ([ROME_NEWLINE], [ROME_NEWLINE]),
        ([STOP], [STOP]),
        ([LINES], [LINES]),
        ([PARIS, LINES], [PARIS]),
        ([PARIS, ACCENT], [PARIS, ACCENT]),
    ],
)
def test_a_newline_ends_a_reply_that_has_begun(script: list[int], kept: list[int]) -> None:
    found = reply(Words(*TEXTS), [*script, PARIS, PARIS])
    assert (found.ids, found.reason) == (kept, "newline")


def test_a_newline_ends_nothing_where_it_shall_not() -> None:
    found = reply(Words(*TEXTS), [PARIS, NEWLINE, PARIS, STOP], newline=False, max_new_tokens=4)
    assert found.ids == [PARIS, NEWLINE, PARIS, STOP] and found.reason == "token limit"


THOUGHTS = (
    "<think>",
    "</think>",
    "hm",
    "\n",
    "Paris",
    "<th",
    "ink>\n",
    "</thi",
    "nk>",
    "<|thinking|>",
    "<|/thinking|>",
)
OPEN, CLOSE, HM, LINE, SAID, OPEN_1, OPEN_2, CLOSE_1, CLOSE_2, OTHER_OPEN, OTHER_CLOSE = range(len(THOUGHTS))


@pytest.mark.parametrize(
    "block",
    [
        [OPEN, LINE, HM, LINE, HM, CLOSE],
        [OPEN, LINE, CLOSE],
        [OPEN_1, OPEN_2, HM, LINE, CLOSE_1, CLOSE_2],
        [OTHER_OPEN, HM, OTHER_CLOSE],
        [OTHER_OPEN, CLOSE, HM, OTHER_CLOSE],  # another family's closing marker is a thought
    ],
)
def test_thoughts_count_on_their_own_and_their_newlines_end_nothing(block: list[int]) -> None:
    script = [*block, LINE, SAID, SAID, SAID]
    found = reply(Words(*THOUGHTS), script, max_new_tokens=3, max_thinking_tokens=len(block))
    assert found.thinking == [True] * len(block) + [False] * 3
    assert found.ids == script[: len(block) + 3] and found.reason == "token limit"
    assert found.said_ids == [LINE, SAID, SAID]
    short = reply(Words(*THOUGHTS), script, max_new_tokens=3, max_thinking_tokens=len(block) - 1)
    assert short.reason == "thinking budget" and short.ids == block


def test_there_is_no_budget_for_thoughts_unless_one_is_given() -> None:
    found = reply(Words(*THOUGHTS), [OPEN, HM, CLOSE, SAID])
    assert (found.ids, found.reason, found.thinking) == ([OPEN], "thinking budget", [True])


def test_a_stop_token_ends_thoughts_too() -> None:
    found = reply(Words(*THOUGHTS), [OPEN, HM, 20], ids=frozenset({20}), max_thinking_tokens=9)
    assert (found.ids, found.reason) == ([OPEN, HM], "stop token")


@pytest.mark.parametrize("end", [[OPEN], [OPEN, LINE], [OPEN_1, OPEN_2]])
def test_a_prompt_may_open_the_thoughts(end: list[int]) -> None:
    script = [HM, LINE, CLOSE, SAID, LINE]
    found = reply(Words(*THOUGHTS), script, [30, *end], max_thinking_tokens=3)
    assert found == Generated(script[:4], "newline", [True, True, True, False])


def test_a_prompt_that_has_closed_them_has_not() -> None:
    found = reply(Words(*THOUGHTS), [SAID, LINE], [30, OPEN, LINE, CLOSE, LINE])
    assert found == Generated([SAID], "newline", [False])


# --- rules and refusals


class Ending(Words):
    eos_token_id = 4


@pytest.mark.parametrize(("configured", "expected"), [(None, {4}), (7, {4, 7}), ([7, 8], {4, 7, 8})])
def test_stop_tokens_are_those_of_tokenizer_and_generation_config(configured: object, expected: set[int]) -> None:
    model = model_of("qwen3")
    model.generation_config.eos_token_id = configured
    assert StopRules.of(model, Ending()).ids == expected
    assert StopRules.of(model, Words()).ids == expected - {4}


def test_what_cannot_be_generated_is_refused() -> None:
    model = model_of("qwen3")
    with pytest.raises(ValueError, match="prompt_ids: expected at least one token, got none"):
        generate_greedily(model, [], stop=ENDLESS)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        generate_greedily(model, PROMPT, stop=ENDLESS, max_new_tokens=0)
    with pytest.raises(ValueError, match="max_thinking_tokens: expected at least 0, got -1"):
        StopRules.of(model, Words(), max_thinking_tokens=-1)
    prefix = PrefixCache(model)
    prefix.extend(torch.tensor([PROMPT]))
    with pytest.raises(ValueError, match="prefix: expected fewer tokens"):
        generate_greedily(model, PROMPT, prefix=prefix, stop=ENDLESS)
    with pytest.raises(ValueError, match="prefix: expected the first"):
        generate_greedily(model, PROMPT[1:], prefix=prefix, stop=ENDLESS)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = model_of("qwen3")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="model: its logits are not finite"):
        generate_greedily(model, PROMPT, stop=ENDLESS)
