"""HeadScores: the scores of every head of a model, with what is needed to understand them, and their files."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locos_fast.scoring.result_folder import ResultKind, read_tensors, tensor_bytes

FILES = ("scores.safetensors", "config.json")
SCORES = ResultKind("scores", "schema_version", 1, FILES, "heads.png", "a score folder")
ARRAYS = ("score", "l_plus", "l_minus", "dla", "attention_spatial", "wu")
OF_SEVERAL_TRIALS = ("per_trial", "ci_low", "ci_high")  # None where there is no mean over trials
RESERVED = frozenset((*ARRAYS, *OF_SEVERAL_TRIALS, "meta", "others"))

Array = NDArray[np.float64]
Head = tuple[int, int]  # (layer, head), both 0-based


def head_name(head: Head) -> str:
    """L12H7."""
    return f"L{head[0]}H{head[1]}"


@dataclasses.dataclass
class HeadScores:
    """Scores of all heads, (layers, heads) float64 arrays; NaN where a layer has no softmax attention or sees no
    needle.

    score              LOCOS: l_plus - l_minus (arXiv 2607.01002)
    l_plus             what the head writes toward the answer from the needle
    l_minus            the same from all other visible keys, scaled to the needle's number of keys
    dla                direct logit attribution: what the head writes from all keys together
    attention_spatial  the LOCOS contrast on attention weights alone, no units
    wu                 copy score: 1 / needle tokens for each answer token whose most attended key is in the needle and
                       is that token
    meta               model, tokens, spans, versions: whatever describes how the scores came about (JSON)
    others             what further detectors say, by name: (layers, heads) each, see `scoring.detectors.DETECTORS`
    per_trial          (trials, layers, heads) `score` of each trial, for a mean over trials
    ci_low, ci_high    (layers, heads) the interval of `score` over trials, where it was computed

    score, l_plus, l_minus and dla are logits where `meta["norm"]` is "frozen", else dot products with raw unembedding
    rows.
    Raises ValueError, naming the array, for arrays that are not of one shape and of real numbers.
    """

    score: Array
    l_plus: Array
    l_minus: Array
    dla: Array
    attention_spatial: Array
    wu: Array
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_trial: Array | None = None
    ci_low: Array | None = None
    ci_high: Array | None = None
    others: dict[str, Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = np.shape(self.score)
        for name in ARRAYS:
            _check_array(name, getattr(self, name), shape if len(shape) == 2 else ("layers", "heads"))
        if self.per_trial is not None:
            trials = np.shape(self.per_trial)[:1] or ("trials",)
            _check_array("per_trial", self.per_trial, (*trials, *shape))
        for name in ("ci_low", "ci_high"):
            if getattr(self, name) is not None:
                _check_array(name, getattr(self, name), shape)
        for name, array in self.others.items():
            if name in RESERVED or not name.isidentifier():
                raise ValueError(f"others: expected names of further detectors, got {name!r}")
            _check_array(name, array, shape)

    @property
    def names(self) -> list[str]:
        """Of all arrays that hold one value a head."""
        return [*ARRAYS, *self.others]

    def array(self, name: str) -> Array:
        """(layers, heads) of one detector. Raises ValueError for a name that is not among `names`."""
        return self._array(name, "name")

    def top(self, k: int, *, by: str = "score") -> list[Head]:
        """The k heads with the largest values of array `by`, largest first; NaN heads are left out.

        Raises ValueError for a k that is no number of heads.
        """
        k = check_count("k", k)
        values = self._array(by, "by")
        order = np.argsort(-values, axis=None, kind="stable")  # NaN sorts last
        heads = [divmod(int(i), values.shape[1]) for i in order if not np.isnan(values.flat[i])]
        return heads[:k]

    def found(self, share: float = 0.1, *, by: str = "score") -> list[Head]:
        """Heads whose value of array `by` is at least `share` of the largest one, largest first.

        The same rule for every detector. Empty if no value is positive.
        Raises ValueError for a share outside 0..1, and for 0, which every head reaches.
        """
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"share: expected a share of the largest value, above 0 and at most 1, got {share!r}")
        values = self._array(by, "by")
        largest = np.nanmax(values, initial=-np.inf)
        if not largest > 0:
            return []
        return [head for head in self.top(values.size, by=by) if values[head] >= share * largest]

    @classmethod
    def mean(cls, scores: Iterable[HeadScores], meta: dict[str, Any] | None = None) -> HeadScores:
        """Mean over trials, head by head; trials in which a head is NaN do not count for it.

        Raises ValueError for no scores, for anything else, and for scores of models of several shapes.
        """
        trials = list(scores)
        if not trials:
            raise ValueError("scores: expected at least one HeadScores, got none")
        for trial in trials:
            if not isinstance(trial, HeadScores):
                raise ValueError(f"scores: expected HeadScores, got {type(trial).__name__}")
        if len(shapes := {trial.score.shape for trial in trials}) > 1:
            raise ValueError(f"scores: expected (layers, heads) of one model, got {sorted(shapes)}")
        names = [name for name in trials[0].names if all(name in trial.names for trial in trials)]
        stacks = {name: np.stack([trial.array(name) for trial in trials]) for name in names}
        return cls.of({n: nan_mean(x) for n, x in stacks.items()}, meta=meta or {}, per_trial=stacks["score"])

    @classmethod
    def of(cls, arrays: Mapping[str, Array], **fields: Any) -> HeadScores:
        """Scores of arrays by name, those of the six published ones and others; `fields` are the further fields.

        Raises ValueError for one of the six that is missing, and as `HeadScores` does.
        """
        if missing := [name for name in ARRAYS if name not in arrays]:
            raise ValueError(f"its scores have no {', '.join(missing)}")
        others = {name: array for name, array in arrays.items() if name not in ARRAYS}
        published: dict[str, Any] = {name: arrays[name] for name in ARRAYS}
        return cls(**published, others=others, **fields)

    def save_pretrained(self, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write config.json and scores.safetensors; both are complete, or the folder has no config.json.

        Raises FileExistsError if the folder already holds scores and `overwrite` is False, or holds something else.
        """
        target = Path(directory)
        SCORES.check(target, overwrite=overwrite)
        arrays = {name: np.asarray(self.array(name), dtype=np.float32) for name in self.names}
        given = {name: getattr(self, name) for name in OF_SEVERAL_TRIALS}
        arrays |= {name: np.asarray(x, dtype=np.float32) for name, x in given.items() if x is not None}
        SCORES.write(target, {FILES[0]: tensor_bytes(arrays)}, self.meta)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> HeadScores:
        """Read a folder that `save_pretrained` wrote. Raises FileNotFoundError or ValueError if it is not one."""
        source = Path(directory)
        meta, content = SCORES.read(source)
        try:
            arrays = read_tensors(content[FILES[0]])
            for name, array in arrays.items():
                _check_array(name, array, array.shape)
            arrays = {name: arrays[name].astype(np.float64) for name in sorted(arrays)}
            several = {name: arrays.pop(name) for name in OF_SEVERAL_TRIALS if name in arrays}
            return cls.of(arrays, meta=meta, **several)
        except ValueError as error:
            raise ValueError(f"{source} is not {SCORES.folder}: {error}") from error

    def _array(self, name: str, argument: str) -> Array:
        if name not in self.names:
            raise ValueError(f"{argument}: expected one of {', '.join(self.names)}, got {name!r}")
        return getattr(self, name) if name in ARRAYS else self.others[name]


def check_count(argument: str, count: int) -> int:
    """Raises ValueError, naming the argument, for anything but a whole number from 0 on."""
    try:
        number = operator.index(count)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{argument}: expected a whole number, 0 or more, got {count!r}")
    return number


def _check_array(name: str, array: Any, shape: tuple) -> None:
    expected = f"{name}: expected an array of real numbers, ({', '.join(map(str, shape))})"
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{expected}, got {getattr(array, 'dtype', type(array).__name__)}")
    if array.shape != shape:
        raise ValueError(f"{expected}, got {array.shape}")


def nan_mean(stack: Array) -> Array:
    """Mean over the first axis, head by head; NaN entries do not count, a head that is NaN throughout stays NaN."""
    known = ~np.isnan(stack)
    count = known.sum(0)
    total = np.where(known, stack, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
