"""HeadScores: the scores of every head of a model, with what is needed to understand them, and their files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from locos_fast.scoring.result_folder import ResultKind, tensor_bytes

SCORES = ResultKind("scores", "schema_version", 1, ("scores.safetensors", "config.json"), "heads.png")
ARRAYS = ("score", "l_plus", "l_minus", "dla", "attention_spatial", "wu")
DETECTOR_NAMES = {"score": "LOCOS", "dla": "DLA", "attention_spatial": "attention-spatial", "wu": "Wu copy score"}

Array = NDArray[np.float64]
Head = tuple[int, int]  # (layer, head), both 0-based


def head_name(head: Head) -> str:
    """L12H7."""
    return f"L{head[0]}H{head[1]}"


@dataclasses.dataclass
class HeadScores:
    """Scores of all heads, (layers, heads) float64 arrays; NaN where a layer has no softmax attention or sees no
    needle.

    score              LOCOS: l_plus - l_minus (arXiv 2607.01002), logits
    l_plus             what the head writes toward the answer from the needle, logits
    l_minus            the same from all other visible keys, scaled to the needle's number of keys, logits
    dla                direct logit attribution: what the head writes from all keys together, logits
    attention_spatial  the LOCOS contrast on attention weights alone, no units
    wu                 copy score: 1 / needle tokens for each answer token whose most attended key is in the needle and
                       is that token
    meta               model, tokens, spans, versions: whatever describes how the scores came about (JSON)
    per_trial          (trials, layers, heads) `score` of each trial, for a mean over trials
    """

    score: Array
    l_plus: Array
    l_minus: Array
    dla: Array
    attention_spatial: Array
    wu: Array
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_trial: Array | None = None

    def top(self, k: int, *, by: str = "score") -> list[Head]:
        """The k heads with the largest values of array `by`, largest first; NaN heads are left out."""
        values = self._array(by)
        order = np.argsort(-values, axis=None, kind="stable")  # NaN sorts last
        heads = [divmod(int(i), values.shape[1]) for i in order if not np.isnan(values.flat[i])]
        return heads[:k]

    def found(self, share: float = 0.1, *, by: str = "score") -> list[Head]:
        """Heads whose value of array `by` is at least `share` of the largest one, largest first.

        The same rule for every detector. Empty if no value is positive.
        """
        values = self._array(by)
        largest = np.nanmax(values, initial=-np.inf)
        if not largest > 0:
            return []
        return [head for head in self.top(values.size, by=by) if values[head] >= share * largest]

    @classmethod
    def mean(cls, scores: Sequence[HeadScores], meta: dict[str, Any] | None = None) -> HeadScores:
        """Mean over trials, head by head; trials in which a head is NaN do not count for it."""
        if not scores:
            raise ValueError("scores: expected at least one HeadScores, got none")
        stacks = {name: np.stack([getattr(s, name) for s in scores]) for name in ARRAYS}
        return cls(**{n: _nan_mean(x) for n, x in stacks.items()}, meta=meta or {}, per_trial=stacks["score"])

    def save_pretrained(self, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write config.json and scores.safetensors; both are complete, or the folder has no config.json.

        Raises FileExistsError if the folder already holds scores and `overwrite` is False, or holds something else.
        """
        target = Path(directory)
        SCORES.check(target, overwrite=overwrite)
        arrays = {name: np.asarray(getattr(self, name), dtype=np.float32) for name in ARRAYS}
        if self.per_trial is not None:
            arrays["per_trial"] = np.asarray(self.per_trial, dtype=np.float32)
        SCORES.write(target, {"scores.safetensors": tensor_bytes(arrays)}, self.meta)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> HeadScores:
        """Read a folder that `save_pretrained` wrote. Raises FileNotFoundError or ValueError if it is not one."""
        source = Path(directory)
        for name in ("config.json", "scores.safetensors"):
            if not (source / name).is_file():
                raise FileNotFoundError(f"{source} is not a score folder: it has no {name}")
        try:
            meta = json.loads((source / "config.json").read_text(encoding="utf-8"))
            arrays = load_file(source / "scores.safetensors")
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{source} is not a score folder: {error}") from error
        version = meta.pop(SCORES.schema, None) if isinstance(meta, dict) else None
        if version != SCORES.version:
            raise ValueError(f"{source}: expected schema version {SCORES.version}, got {version}")
        if missing := [name for name in ARRAYS if name not in arrays]:
            raise ValueError(f"{source} is not a score folder: its scores have no {', '.join(missing)}")
        arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
        return cls(**{n: arrays[n] for n in ARRAYS}, meta=meta, per_trial=arrays.get("per_trial"))

    def _array(self, name: str) -> Array:
        if name not in ARRAYS:
            raise ValueError(f"by: expected one of {', '.join(ARRAYS)}, got {name!r}")
        return getattr(self, name)


def _nan_mean(stack: Array) -> Array:
    known = ~np.isnan(stack)
    count = known.sum(0)
    total = np.where(known, stack, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
