"""Greedy answers, from the model's own attention and behind a shared beginning."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits, row_logits
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.prompts.thinking import ThinkingBlocks
from locos_fast.prompts.token_texts import decoded

Reason = Literal["stop token", "newline", "token limit", "thinking budget"]


@dataclass(frozen=True)
class StopRules:
    """What ends a generated answer, beside its greatest length.

    tokenizer            decodes what was generated
    ids                  tokens that end it and are no part of it
    newline              whether the end of its first line that is not blank does; a token such as ".\\n" belongs to it
    max_thinking_tokens  so many tokens may be spent on thinking blocks, markers included; one more ends generation
    """

    tokenizer: Any
    ids: frozenset[int] = frozenset()
    newline: bool = True
    max_thinking_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_thinking_tokens < 0:
            raise ValueError(f"max_thinking_tokens: expected at least 0, got {self.max_thinking_tokens}")

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: Any, *, newline: bool = True, max_thinking_tokens: int = 0
    ) -> StopRules:
        """The end-of-sequence tokens of the tokenizer and of the model's generation config, which for a chat model has
        its end of turn."""
        named = [tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
        ids = [token for name in named for token in (name if isinstance(name, list | tuple) else [name])]
        return cls(tokenizer, frozenset(int(token) for token in ids if token is not None), newline, max_thinking_tokens)


class Generated(NamedTuple):
    """A generated reply.

    ids       its tokens, without the stop token or newline that ended it
    reason    why it ended; by "thinking budget" with the token that was one too many
    thinking  one bool for each token: whether it belongs to a thinking block, markers included
    """

    ids: list[int]
    reason: Reason
    thinking: list[bool]

    @property
    def said_ids(self) -> list[int]:
        """The tokens outside thinking blocks."""
        return _said(self.ids, self.thinking)


def _said(ids: Sequence[int], thinking: Sequence[bool]) -> list[int]:
    return [token for token, thought in zip(ids, thinking, strict=True) if not thought]


@torch.inference_mode()
def generate_greedily(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    prefix: PrefixCache | None = None,
    stop: StopRules,
    max_new_tokens: int = 50,
    token_chunk: int | None = TOKENS_PER_CHUNK,
) -> Generated:
    """The reply that the model gives to a prompt if it takes its likeliest token each time.

    prefix: keys and values of the first tokens of the prompt, not all of them, from which it continues; it is put
    back. Without one the prompt has a cache of its own; a model that takes no cache, or whose keys depend on the length
    of the forward pass, computes everything anew for each token, as scoring does: slow, and exact.
    max_new_tokens: outside thinking blocks, a stop token not counted. token_chunk: see `token_chunks`; of the prompt.

    Attention runs as the model runs it; nothing is recorded or replaced. Keys and values of all tokens are in memory,
    once; behind a prefix those of layers that are not cropped (`prefix_cache`) a second time. To score the reply, put
    it behind the prompt and call `score_tokens`, with the same prefix.
    Raises ValueError for an empty prompt, fewer than one new token, a prefix of another prompt, and logits that are not
    finite.
    """
    if not len(prompt_ids):
        raise ValueError("prompt_ids: expected at least one token, got none")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    device = model.get_input_embeddings().weight.device
    prompt = torch.tensor([[int(token) for token in prompt_ids]], device=device)
    if prefix is not None:
        prefix.check_continued_by(prompt, [prompt.shape[1] - 1])
    reply = _Reply(stop, ThinkingBlocks(stop.tokenizer, prompt[0].tolist()), max_new_tokens)
    with contextlib.closing(_next_tokens(model, prompt, prefix, token_chunk)) as tokens:
        reason = next(reason for token in tokens if (reason := reply.add(token)) is not None)
    return Generated(reply.ids, reason, reply.blocks.marks[: len(reply.ids)])


def _next_tokens(
    model: PreTrainedModel, prompt: Tensor, prefix: PrefixCache | None, token_chunk: int | None
) -> Generator[int, None, None]:
    """The model's greedy continuation of a (1, N) prompt, without end."""
    if prefix is None:
        try:
            prefix = PrefixCache(model)
        except UnsupportedModelError:
            yield from _without_cache(model, prompt, token_chunk)
            return
    with prefix.branch():
        with token_chunks(model, token_chunk):
            token = _likeliest(model, prompt[:, prefix.tokens :], prefix)
        while True:
            yield int(token)
            token = _likeliest(model, token[None, None].to(prompt.device), prefix)


def _without_cache(model: PreTrainedModel, ids: Tensor, token_chunk: int | None) -> Generator[int, None, None]:
    with token_chunks(model, token_chunk):
        for last in itertools.count(ids.shape[1] - 1):
            token = answer_logits(model, ids, [last])[-1].float().argmax()
            yield int(token)
            ids = torch.cat([ids, token[None, None].to(ids.device)], dim=1)


def _likeliest(model: PreTrainedModel, ids: Tensor, prefix: PrefixCache) -> Tensor:
    """The token, a scalar, that follows (1, n) `ids`, which go into the cache."""
    return row_logits(model, ids, [ids.shape[1] - 1], prefix.forward_arguments())[-1].float().argmax()


@dataclass
class _Reply:
    """What was generated so far, judged token by token."""

    stop: StopRules
    blocks: ThinkingBlocks
    max_new_tokens: int
    ids: list[int] = field(default_factory=list)

    def add(self, token: int) -> Reason | None:
        """Why the reply ends with or before this token; None while it goes on."""
        if token in self.stop.ids:
            return "stop token"
        self.blocks.add(token)
        if self.stop.newline and not self.blocks.marks[-1] and self._ends_line(token):
            return "newline"
        self.ids.append(token)
        if self.blocks.tokens > self.stop.max_thinking_tokens:
            return "thinking budget"
        return "token limit" if len(self.ids) - self.blocks.tokens >= self.max_new_tokens else None

    def _ends_line(self, token: int) -> bool:
        """Whether a line that is not blank ends in this token, which is kept if it has a part in that line."""
        text = decoded(self.stop.tokenizer, [token])  # no other character has the byte of a newline
        if "\n" not in text:
            return False
        before = decoded(self.stop.tokenizer, _said(self.ids, self.blocks.marks[:-1]))
        line, newline, _ = (before + text).lstrip().partition("\n")
        if newline and line.rstrip() != before.strip():
            self.ids.append(token)
        return bool(newline)
