"""PassageAttribution: what every head wrote toward the answer from every passage of a prompt, and its files."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from locos_fast.scoring.head_scores import Head, check_count
from locos_fast.scoring.result_folder import ResultKind, read_tensors, tensor_bytes

FILES = ("attribution.safetensors", "passages.jsonl", "config.json")
# not "schema_version", which marks a score folder
ATTRIBUTION = ResultKind(
    "an attribution", "attribution_schema_version", 1, FILES, "attribution.png", "an attribution folder"
)


class Passage(NamedTuple):
    """A half-open span of tokens and the text it stands for."""

    start: int
    end: int
    text: str


class Pair(NamedTuple):
    """What one head wrote from one passage, in the units of the published score."""

    head: Head
    passage: int
    logits: float


@dataclasses.dataclass(frozen=True)
class PassageAttribution:
    """What heads wrote toward the answer from passages of the prompt.

    logits     (layers, heads, passages), dot products with raw unembedding rows, see `attribute_tokens`; NaN where a
               layer has no softmax attention
    passages   the passages, in the order of the array's last axis
    meta       model, prompt, answer, versions: whatever describes how the numbers came about (JSON)

    Raises ValueError for an array that is not of that shape or not of real numbers.
    """

    logits: NDArray
    passages: list[Passage]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        fits = isinstance(self.logits, np.ndarray) and self.logits.dtype.kind == "f" and self.logits.ndim == 3
        if not fits or self.logits.shape[2] != len(self.passages):
            got = f"{np.shape(self.logits)} {getattr(self.logits, 'dtype', type(self.logits).__name__)}"
            raise ValueError(f"logits: expected real numbers, (layers, heads, {len(self.passages)}), got {got}")

    @cached_property
    def totals(self) -> NDArray:
        """Sum over all heads, (passages,), in the units of `logits`."""
        return np.asarray(np.nansum(self.logits, axis=(0, 1), dtype=np.float64))

    def top_passages(self, k: int) -> list[int]:
        """Indices of the k passages from which most was written toward the answer, most first."""
        return [int(i) for i in np.argsort(-self.totals, kind="stable")[: check_count("k", k)]]

    def strongest_head(self, passage: int) -> Head:
        """The head that wrote most toward the answer from a passage."""
        layer, head = np.unravel_index(np.nanargmax(self.logits[:, :, passage]), self.logits.shape[:2])
        return int(layer), int(head)

    def top_pairs(self, k: int) -> list[Pair]:
        """The k (head, passage) pairs with the largest logits, largest first; NaN is left out."""
        k = check_count("k", k)
        candidates: list[Pair] = []
        if k == 0:
            return candidates
        for layer, values in enumerate(self.logits):  # layer by layer: at 100K passages all pairs are 10^8
            known = np.where(np.isnan(values), -np.inf, values).ravel()
            for i in np.argpartition(-known, k - 1)[:k] if k < known.size else range(known.size):
                head, passage = divmod(int(i), values.shape[1])
                candidates.append(Pair((layer, head), passage, float(known[i])))
        candidates = [pair for pair in candidates if pair.logits > -np.inf]
        return sorted(candidates, key=lambda pair: (-pair.logits, pair.head, pair.passage))[:k]

    def save_pretrained(self, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write attribution.safetensors, passages.jsonl and config.json; all complete, or there is no config.json.

        Raises FileExistsError if the folder already holds an attribution and `overwrite` is False, or holds something
        else.
        """
        target = Path(directory)
        ATTRIBUTION.check(target, overwrite=overwrite)
        spans = np.array([(passage.start, passage.end) for passage in self.passages], dtype=np.int64)
        lines = (json.dumps(passage._asdict(), ensure_ascii=False) + "\n" for passage in self.passages)
        arrays = tensor_bytes({"logits": self.logits, "spans": spans})
        ATTRIBUTION.write(target, {FILES[0]: arrays, FILES[1]: "".join(lines).encode()}, self.meta)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> PassageAttribution:
        """Read a folder that `save_pretrained` wrote. Raises FileNotFoundError or ValueError if it is not one."""
        source = Path(directory)
        meta, content = ATTRIBUTION.read(source)
        try:
            lines = content[FILES[1]].decode().split("\n")  # a text may hold other line ends
            passages = [_passage(line) for line in lines if line]
            arrays = read_tensors(content[FILES[0]])
            return cls(arrays["logits"], passages, meta)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{source} is not {ATTRIBUTION.folder}: {error}") from error


def _passage(line: str) -> Passage:
    passage = Passage(**json.loads(line))
    if not (isinstance(passage.start, int) and isinstance(passage.end, int) and isinstance(passage.text, str)):
        raise ValueError(f"expected a passage with start, end and text, got {line[:60]}")
    return passage
