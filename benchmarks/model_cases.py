"""The cases of the model suite: one model at one length of prompt and answer."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import NamedTuple

from benchmarks.models import OF_DEVICE, Shape

ROWS = 8  # answer steps
NEEDLE = 32  # tokens, in the middle
SEGMENTS = 1000
TOKEN_CHUNK = {"cuda": 8192, "cpu": 512}  # of the provider that runs in chunks; longer than a CPU's prompts by default
CONTEXTS = {
    ("cuda", False): (4096, 8192, 32_768, 102_400, 131_072),
    ("cuda", True): (8192, 32_768),
    ("cpu", False): (1024, 4096),
    ("cpu", True): (1024, 2048),
}


class ModelCase(NamedTuple):
    """A model, and how many tokens the prompt and the answer have together."""

    shape: Shape
    n_tokens: int
    token_chunk: int

    @property
    def label(self) -> str:
        return f"{self.shape.name} N={self.n_tokens}"

    @property
    def config(self) -> dict[str, int | str | None]:
        sizes = {"n_tokens": self.n_tokens, "rows": ROWS, "needle": NEEDLE, "segments": len(self.segments)}
        sizes["token_chunk"] = self.token_chunk
        return self.shape.config | sizes

    @classmethod
    def from_config(cls, config: dict) -> ModelCase:
        return cls(Shape.from_config(config), config["n_tokens"], config["token_chunk"])

    @property
    def answer_positions(self) -> list[int]:
        """The last tokens."""
        return list(range(self.n_tokens - ROWS, self.n_tokens))

    @property
    def needle(self) -> tuple[int, int]:
        middle = self.n_tokens // 2
        return middle - NEEDLE // 2, middle + NEEDLE // 2

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The prompt cut into spans whose lengths differ by one token at most."""
        prompt = self.n_tokens - ROWS
        number = min(SEGMENTS, prompt)
        borders = [index * prompt // number for index in range(number + 1)]
        return list(pairwise(borders))


def plan(device: str, *, quick: bool, contexts: Collection[int] | None = None) -> list[ModelCase]:
    """The cases of a run on "cpu" or "cuda"; only some lengths, if given."""
    shape = OF_DEVICE[device]
    return [ModelCase(shape, n, TOKEN_CHUNK[device]) for n in CONTEXTS[device, quick] if not contexts or n in contexts]
