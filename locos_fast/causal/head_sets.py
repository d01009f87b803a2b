"""Sets of heads: the best or worst by a score, those above a bound, a list, or what stands in a file.

Files that other projects write are read too: one line of JSON with {"layer-head": [score of each trial, ...]} (Wu et
al.), the same inside {"scores": ...} (LOCOS), and JSON lists of "layer-head", [layer, head] or ["layer-head", score]
(QRHead).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from locos_fast.causal.model_shape import ModelShape, check_heads, model_shape, refuse_repeated
from locos_fast.scoring.head_scores import Head, HeadScores, check_count

HEAD = re.compile(r"\s*(?:L(\d{1,6})H(\d{1,6})|(\d{1,6})-(\d{1,6}))\s*", re.ASCII)
EXAMPLE = '"18-6" or "L18H6"'
SHOWN = 60  # characters of what is wrong in a file


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Heads by value, the largest first; of equal ones the lower layer and head. Heads without a value are not in it.

    origin: where the values come from, for error messages. Raises ValueError for a ranking of no heads.
    """

    values: Mapping[Head, float]
    origin: str = "the ranking"

    def __post_init__(self) -> None:
        known = {head: float(value) for head, value in self.values.items() if not math.isnan(value)}
        if not known:
            raise ValueError(f"heads: {self.origin} has no head with a value")
        order = sorted(known, key=lambda head: (-known[head], head))
        object.__setattr__(self, "values", {head: known[head] for head in order})

    @classmethod
    def of(cls, scores: HeadScores, by: str = "score", origin: str | None = None) -> Ranking:
        """By any array of the scores. Raises ValueError for a name that they do not have, and for an array of NaN."""
        if by not in scores.names:
            raise ValueError(f"by: expected one of {', '.join(scores.names)}, got {by!r}")
        values = {(int(layer), int(head)): float(value) for (layer, head), value in np.ndenumerate(scores.array(by))}
        return cls(values, origin or f"array {by!r}")

    def top(self, k: int) -> list[Head]:
        """The k heads with the largest values, largest first. Raises ValueError unless 1 <= k <= their number."""
        return list(self.values)[: self._count(k)]

    def bottom(self, k: int) -> list[Head]:
        """The k heads with the smallest values of all, smallest first. Raises ValueError as `top` does."""
        k = self._count(k)
        return sorted(self.values, key=lambda head: (self.values[head], head))[:k]

    def at_least(self, threshold: float) -> list[Head]:
        """Heads with a value of `threshold` or more, largest first. Raises ValueError if there is none."""
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or math.isnan(threshold):
            raise ValueError(f"threshold: expected a number, got {threshold!r}")
        if found := [head for head, value in self.values.items() if value >= threshold]:
            return found
        largest = next(iter(self.values.values()))
        raise ValueError(f"threshold: no head of {self.origin} reaches {threshold}; the largest value is {largest:.4g}")

    def share(self, share: float) -> list[Head]:
        """Heads with at least `share` of the largest value, largest first: the rule of `HeadScores.found`.

        Raises ValueError for a share outside 0 to 1, and if no value is positive.
        """
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"share: expected a share of the largest value, above 0 and at most 1, got {share!r}")
        largest = next(iter(self.values.values()))
        if largest <= 0:
            raise ValueError(f"share: no head of {self.origin} has a positive value")
        return [head for head, value in self.values.items() if value >= share * largest]

    def _count(self, k: int) -> int:
        if not 1 <= check_count("k", k) <= len(self.values):
            raise ValueError(f"k: expected 1 to {len(self.values)}, the heads with a value in {self.origin}, got {k}")
        return k


def parse_head(text: str) -> Head:
    """ "18-6" or "L18H6". Raises ValueError for anything else."""
    match = HEAD.fullmatch(text)
    if match is None:
        raise ValueError(f"heads: expected a head such as {EXAMPLE}, got {text[:SHOWN]!r}")
    layer, head = (int(number) for number in match.groups() if number is not None)
    return layer, head


def parse_heads(text: str) -> list[Head]:
    """A list of heads, "18-6,23-2" or "L18H6, L23H2", in its order. Raises ValueError for anything else."""
    return [parse_head(part) for part in text.split(",")]


def given_heads(
    given: str | os.PathLike, model: PreTrainedModel | ModelShape, *, k: int | None = None, by: str | None = None
) -> list[Head]:
    """The heads that a user names for a model: a list such as "18-6,23-2", or what `read_heads` takes.

    Raises ValueError as `read_heads` does.
    """
    text = os.fspath(given)
    if all(HEAD.fullmatch(part) for part in text.split(",")):
        return check_heads(model, _first(parse_heads(text), k, by, "the list"))
    if not text or not Path(text).exists():
        raise ValueError(f"heads: expected a list such as 18-6,23-2, a score folder or a file, got {text!r}")
    return read_heads(text, model, k=k, by=by)


def read_heads(
    path: str | os.PathLike, model: PreTrainedModel | ModelShape, *, k: int | None = None, by: str | None = None
) -> list[Head]:
    """Heads of `model` from a score folder, a scan's too, or from a file in one of the formats above.

    k: how many of the best; a list of heads without values is taken whole where it is left out.
    by: the array of a score folder that ranks, `score` if left out; other sources have one value a head.
    Raises ValueError for what cannot be read, scores of a model of another shape, heads that the model does not have,
    and a k larger than the number of heads.
    """
    shape, source = model_shape(model), Path(path)
    found = _folder_ranking(source, shape, by or "score") if source.is_dir() else _read_file(source)
    if isinstance(found, list):
        return check_heads(shape, _first(found, k, by, str(source)))
    if by is not None and not source.is_dir():
        raise ValueError(f"by: {source} holds one value a head; only a score folder has arrays to choose from")
    layers, heads = shape.score_shape  # layers without softmax attention may have values here, 0 as a rule
    if outside := [head for head in found.values if head[0] >= layers or head[1] >= heads]:
        raise ValueError(f"heads: {source} has a score of head {outside[0][0]}-{outside[0][1]}, the model has {shape}")
    if k is None:
        raise ValueError(f"k: {source} ranks {len(found.values)} heads; say how many of the best to take")
    return check_heads(shape, found.top(k))


def _first(heads: list[Head], k: int | None, by: str | None, origin: str) -> list[Head]:
    """Of heads that are listed without values."""
    if by is not None:
        raise ValueError(f"by: {origin} names heads without scores, there is nothing to rank them by")
    if k is None:
        return heads
    if not 1 <= check_count("k", k) <= len(heads):
        raise ValueError(f"k: expected 1 to {len(heads)}, the heads in {origin}, got {k}")
    return heads[:k]


def _folder_ranking(folder: Path, shape: ModelShape, by: str) -> Ranking:
    try:
        scores = HeadScores.from_pretrained(folder)
    except FileNotFoundError as error:
        raise ValueError(f"heads: {error}") from error
    if scores.score.shape != shape.score_shape:
        layers, heads = scores.score.shape
        raise ValueError(f"heads: {folder} holds scores of {layers} layers of {heads} heads, the model has {shape}")
    return Ranking.of(scores, by, f"array {by!r} of {folder}")


def _read_file(path: Path) -> Ranking | list[Head]:
    try:
        content = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"heads: cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"heads: {path} is no JSON: {error}") from error
    try:
        if isinstance(content, dict):
            scores = content["scores"] if isinstance(content.get("scores"), dict) else content
            return Ranking({parse_head(head): _mean(head, value) for head, value in scores.items()}, str(path))
        if isinstance(content, list):
            return _listed(content, str(path))
        raise ValueError(f"heads: expected a JSON object or list, got {_short(content)}")
    except ValueError as error:
        reason = str(error).removeprefix("heads: ").removeprefix(f"{path} ")
        raise ValueError(f"heads: {path}: {reason}") from error


def _listed(entries: list[Any], origin: str) -> Ranking | list[Head]:
    pairs = [entry for entry in entries if isinstance(entry, list) and len(entry) == 2]
    if pairs and all(isinstance(entry[0], str) for entry in pairs) and len(pairs) == len(entries):
        heads = [parse_head(name) for name, _ in pairs]
        refuse_repeated(heads)
        return Ranking({head: _mean(*entry) for head, entry in zip(heads, pairs, strict=True)}, origin)
    return [parse_head(entry) if isinstance(entry, str) else _pair(entry) for entry in entries]


def _pair(entry: Any) -> Head:
    if isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry):
        return entry[0], entry[1]
    raise ValueError(f'heads: expected "18-6", [18, 6] or ["18-6", score] in all entries, got {_short(entry)}')


def _mean(head: str, value: Any) -> float:
    """Of the trials of a head; NaN of none."""
    values = value if isinstance(value, list) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"heads: {head}: expected a finite score or a list of them, got {_short(value)}")
    return math.fsum(values) / len(values) if values else math.nan


def _short(value: Any) -> str:
    return json.dumps(value)[:SHOWN]
