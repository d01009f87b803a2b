"""The cases of the trial suite: one example on one model, prompts of several lengths."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models import OF_DEVICE, Shape, build, tokens
from benchmarks.number_tokenizer import NumberTokenizer
from locos_fast import planted

PLANTED = "planted"
NEEDLE = 32  # tokens, on models with random weights
STEPS = 8  # answer tokens there
CONTEXTS = {
    ("cuda", False): (4096, 8192, 16_384, 32_768, 65_536),
    ("cuda", True): (8192,),
    ("cpu", False): (512, 1024, 2048),
    ("cpu", True): (512, 1024),
}


class TrialCase(NamedTuple):
    """A model and an example: a prompt of `n_tokens`, followed by an answer of `steps` tokens."""

    model: str
    layers: int
    heads: int
    n_tokens: int
    steps: int
    dtype: str
    public: str  # commit of the public code; empty without it

    @property
    def label(self) -> str:
        return f"{self.model} N={self.n_tokens} T={self.steps} {self.dtype}"

    @property
    def config(self) -> dict[str, int | str | None]:
        return self._asdict()

    @classmethod
    def from_config(cls, config: dict) -> TrialCase:
        return cls(**config)


class Example(NamedTuple):
    """What is scored. Without an answer, whatever the model generates is the answer."""

    prompt_ids: Tensor  # (1, N)
    needle: tuple[int, int]
    answer_ids: list[int]
    answer: str


class Subject(NamedTuple):
    """A model, its tokenizer, and examples of a given length."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    example: Callable[[int], Example]

    def case(self, n_tokens: int, steps: int, public: str) -> TrialCase:
        config = self.model.config
        dtype = str(self.model.dtype).removeprefix("torch.")
        return TrialCase(
            self.name, config.num_hidden_layers, config.num_attention_heads, n_tokens, steps, dtype, public
        )


def planted_subject(device: str, kind: str = "non_literal") -> Subject:
    """The planted model in float32; the answer to its question is one token."""
    found = planted.build()
    model = found.model.to(device)

    def example(n_tokens: int) -> Example:
        trial = found.trial(n_tokens, kind, depth=50, seed=0)
        prompt = torch.tensor([trial.prompt_ids], device=device)
        return Example(prompt, trial.needle_span, list(trial.answer_ids), trial.answer)

    return Subject(PLANTED, model, found.tokenizer, example)


def random_subject(shape: Shape, device: str) -> Subject:
    """A model with random weights, whose answer is what it generates."""
    return Subject(shape.name, build(shape, device), NumberTokenizer(), partial(_random_example, shape, device))


def _random_example(shape: Shape, device: str, n_tokens: int) -> Example:
    middle = n_tokens // 2
    return Example(tokens(shape, n_tokens, device), (middle - NEEDLE // 2, middle + NEEDLE // 2), [], "")


def subjects(device: str) -> list[Callable[[], Subject]]:
    """Made one after the other, as both may not fit."""
    return [partial(planted_subject, device), partial(random_subject, OF_DEVICE[device], device)]


def contexts(device: str, *, quick: bool, only: Collection[int] | None = None) -> list[int]:
    return [n for n in CONTEXTS[device, quick] if not only or n in only]
