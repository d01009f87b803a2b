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
from safetensors import SafetensorError
from safetensors.numpy import load_file

from locos_fast.scoring.head_scores import Head
from locos_fast.scoring.result_folder import ResultKind, tensor_bytes

FILES = ("attribution.safetensors", "passages.jsonl", "config.json")
# not "schema_version", which marks a score folder
ATTRIBUTION = ResultKind("an attribution", "attribution_schema_version", 1, FILES, "attribution.png")


class Passage(NamedTuple):
    """A half-open span of tokens and the text it stands for."""

    start: int
    end: int
    text: str


class Pair(NamedTuple):
    """What one head wrote from one passage, in logits before the final norm."""

    head: Head
    passage: int
    logits: float


@dataclasses.dataclass(frozen=True)
class PassageAttribution:
    """What heads wrote toward the answer from passages of the prompt.

    logits     (layers, heads, passages), see `attribute_tokens`; NaN where a layer has no softmax attention
    passages   the passages, in the order of the array's last axis
    meta       model, prompt, answer, versions: whatever describes how the numbers came about (JSON)
    """

    logits: NDArray
    passages: list[Passage]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def totals(self) -> NDArray:
        """Sum over all heads, (passages,) logits."""
        return np.asarray(np.nansum(self.logits, axis=(0, 1), dtype=np.float64))

    def top_passages(self, k: int) -> list[int]:
        """Indices of the k passages from which most was written toward the answer, most first."""
        return [int(i) for i in np.argsort(-self.totals, kind="stable")[:k]]

    def strongest_head(self, passage: int) -> Head:
        """The head that wrote most toward the answer from a passage."""
        layer, head = np.unravel_index(np.nanargmax(self.logits[:, :, passage]), self.logits.shape[:2])
        return int(layer), int(head)

    def top_pairs(self, k: int) -> list[Pair]:
        """The k (head, passage) pairs with the largest logits, largest first; NaN is left out."""
        candidates = []
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
        for name in FILES:
            if not (source / name).is_file():
                raise FileNotFoundError(f"{source} is not an attribution folder: it has no {name}")
        try:
            meta = json.loads((source / "config.json").read_text(encoding="utf-8"))
            logits = load_file(source / FILES[0])["logits"]
            lines = (source / FILES[1]).read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
            passages = [Passage(**json.loads(line)) for line in lines if line]
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{source} is not an attribution folder: {error}") from error
        version = meta.pop(ATTRIBUTION.schema, None) if isinstance(meta, dict) else None
        if version != ATTRIBUTION.version:
            raise ValueError(f"{source}: expected attribution schema version {ATTRIBUTION.version}, got {version}")
        return cls(logits, passages, meta)
