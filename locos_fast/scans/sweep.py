"""An ablation sweep: recall without the best heads of several detectors, beside the sets that a claim has to beat."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from locos_fast.causal.ablation import MODES, Head
from locos_fast.causal.answers import Answer, given_answers
from locos_fast.causal.calibration import CALIBRATED, CalibratedMeans
from locos_fast.causal.controls import draws
from locos_fast.causal.head_sets import Ranking
from locos_fast.causal.model_shape import ModelShape
from locos_fast.causal.permutation import AgainstNull, against_null
from locos_fast.models.description import describe_model, model_identity
from locos_fast.prompts.scan_trials import ScanTrials
from locos_fast.prompts.trials import Trial
from locos_fast.scans.manifest import difference
from locos_fast.scans.store import ScanFolder, write_atomically

SCHEMA_VERSION = 1
PLAN, LINES, RESULT = "sweep.json", "points.jsonl", "ablation.json"
INTACT, BOTTOM, GIVEN = "intact", "bottom", "given"
CONTROLS = ("layer-matched", "random")
DECIDING = ("mode", "calibration_sha256", "weights", "architecture", "dtype", "attn_implementation")
METRICS = ("accuracy", "log_probability")


class Point(NamedTuple):
    """One set of heads to take away."""

    set: str  # the detector's array, "given" for a list, "bottom", or the kind of a control
    k: int
    draw: int  # of a control, from 0
    heads: list[Head]

    @property
    def key(self) -> str:
        """Of what is computed: the same heads are ablated once."""
        return hashlib.sha256(json.dumps(sorted(self.heads)).encode()).hexdigest()[:16]


def plan(
    rankings: Mapping[str, Ranking],
    shape: ModelShape,
    ks: Sequence[int],
    *,
    count: int = 10,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
) -> list[Point]:
    """The k best heads by each ranking, the k lowest by the first, and `count` draws of each control for the first.

    Where a control has fewer different draws than asked for, all there are. Raises ValueError for a k larger than a
    ranking, and where not one draw exists.
    """
    if not rankings:
        raise ValueError("detectors: expected at least one, got none")
    first, points = next(iter(rankings.values())), []
    for k in sorted(set(ks)):
        points += [Point(name, k, 0, ranking.top(k)) for name, ranking in rankings.items()]
        points.append(Point(BOTTOM, k, 0, first.bottom(k)))
        for kind in controls:
            found = draws(kind, shape, first.top(k), count, seed)
            points += [Point(kind, k, number, heads) for number, heads in enumerate(found.sets)]
    return points


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    trials    trials in all
    passed    of these, those that the intact model answers right: only they count
    baseline  log probability of the answer in the intact model, mean over the trials that count, nats
    accuracy, log_probability  of each point, means over the trials that count
    """

    points: list[Point]
    trials: int
    passed: int
    baseline: float
    accuracy: list[float]
    log_probability: list[float]

    def values(self, name: str, k: int, metric: str = "accuracy") -> list[float]:
        """Of one set, a value a draw."""
        of_points = zip(self.points, getattr(self, metric), strict=True)
        return [value for point, value in of_points if (point.set, point.k) == (name, k)]

    def against(self, name: str, k: int, control: str) -> AgainstNull | None:
        """A set's accuracy beside its control's draws; low is extreme. None without draws."""
        null = self.values(control, k)
        return against_null(self.values(name, k)[0], null, extreme="low") if null else None

    @property
    def ks(self) -> list[int]:
        return sorted({point.k for point in self.points})

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(point.set for point in self.points))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        points = [
            {"set": point.set, "k": point.k, "draw": point.draw, "metric": metric, "value": values[i]}
            for metric, values in zip(METRICS, (self.accuracy, self.log_probability), strict=True)
            for i, point in enumerate(self.points)
        ]
        baseline = {"trials": self.trials, "passed": self.passed, "accuracy": 1.0, "log_probability": self.baseline}
        return {"baseline": baseline, "points": points}


class Progress(NamedTuple):
    done: int  # sets of heads
    total: int


def sweep(
    model: PreTrainedModel,
    trials: Sequence[Trial] | ScanTrials,
    points: Sequence[Point],
    out: str | Path,
    *,
    mode: str = "output-zero",
    calibration: Sequence[Trial] = (),
    config: dict[str, Any] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Sweep:
    """Recall of the model without each point's heads, into the folder `out`.

    The intact model answers first; trials that it gets wrong are out, and counted. mode: see `ablate`. calibration:
    other trials, on whose prompts modes that need it measure what heads do. config: what else the result depends on
    (JSON). resume: continue a sweep that the folder holds; its tables are then those of an uninterrupted one, to the
    byte.
    Raises ValueError if the intact model answers no trial, and for another sweep's folder, saying what differs;
    FileExistsError if it holds one and `resume` is False, or another process works on it.
    """
    if isinstance(trials, ScanTrials):
        composed = trials
        trials, config = composed.trials, composed.config | (config or {})
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode in CALIBRATED and not calibration:
        raise ValueError(f"calibration: expected trials for mode {mode!r}, got none")
    folder = _Folder(Path(out))
    deciding = {"mode": mode, "calibration_sha256": _digest(calibration)}
    what = {**deciding, **describe_model(model), **model_identity(model), **(config or {})}
    with ScanFolder(folder.path).locked():
        folder.begin(what, trials, points, resume=resume)
        done = folder.lines()
        if INTACT not in done:
            folder.append(INTACT, given_answers(model, trials))
            done = folder.lines()
        counted = [i for i, right in enumerate(done[INTACT]["right"]) if right]
        if not counted:
            raise ValueError(f"no trial counts: the intact model answers none of {len(trials)} right")
        open_points = list({point.key: point for point in points if point.key not in done}.values())
        total = len({point.key for point in points})
        prompts = [trial.prompt_ids for trial in calibration]
        means = CalibratedMeans.of(model, prompts) if mode in CALIBRATED and prompts and open_points else None
        for number, point in enumerate(open_points, total - len(open_points) + 1):
            answers = given_answers(model, [trials[i] for i in counted], point.heads, mode=mode, calibration=means)
            folder.append(point.key, answers)
            progress(Progress(number, total))
        found = _conclude(list(points), len(trials), folder.lines())
        write_atomically(folder.path / RESULT, {**found.as_dict(), "config": what})
    return found


def _conclude(points: list[Point], trials: int, lines: dict[str, dict[str, Any]]) -> Sweep:
    intact = lines[INTACT]
    counted = [value for value, right in zip(intact["log_probability"], intact["right"], strict=True) if right]
    return Sweep(
        points,
        trials,
        len(counted),
        float(np.mean(counted)),
        [float(np.mean(lines[point.key]["right"])) for point in points],
        [float(np.mean(lines[point.key]["log_probability"])) for point in points],
    )


def check_free(path: Path, *, resume: bool) -> None:
    """Raises FileExistsError if the folder holds a sweep and `resume` is False, or something else."""
    if (path / PLAN).exists():
        if not resume:
            raise FileExistsError(f"{path} already holds a sweep; --resume continues it, or choose another folder")
    elif any(path.glob("*.json*")):
        raise FileExistsError(f"{path} holds something else; choose another folder")


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration the answers depend on besides trials and heads; all else describes."""
    return {name: config.get(name) for name in DECIDING}


def _digest(trials: Sequence[Trial]) -> str:
    asked = json.dumps([[trial.prompt_ids, trial.answer_ids, list(trial.needle_span)] for trial in trials])
    return hashlib.sha256(asked.encode()).hexdigest()


class _Folder:
    """A sweep on disk: its plan, a line for each set of heads that was tried, and the result."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, config: dict[str, Any], trials: Sequence[Trial], points: Sequence[Point], *, resume: bool) -> None:
        plan = {
            "schema_version": SCHEMA_VERSION,
            "config": config,
            "trials": [trial.id for trial in trials],
            "trials_sha256": _digest(trials),
            "points": [point._asdict() for point in points],
        }
        plan = json.loads(json.dumps(plan))  # as it is read again
        check_free(self.path, resume=resume)
        if not (self.path / PLAN).exists():
            write_atomically(self.path / PLAN, plan)
            return
        before = self._plan()
        if changed := difference(*(_deciding(found["config"]) for found in (before, plan))):
            raise ValueError(f"{self.path} holds a sweep with another configuration: {changed}")
        if any(before[name] != plan[name] for name in ("trials_sha256", "points")):
            raise ValueError(f"{self.path} holds a sweep of other trials or other sets of heads")

    def _plan(self) -> dict[str, Any]:
        """Raises ValueError if it is none that this version reads."""
        try:
            found = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
            if found["schema_version"] == SCHEMA_VERSION and isinstance(found["config"], dict) and found["points"]:
                return {**found, "trials_sha256": found["trials_sha256"]}
            reason = f"schema version {found['schema_version']}"
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error)
        raise ValueError(f"{self.path / PLAN}: no plan of a sweep that can be read ({reason})")

    def lines(self) -> dict[str, dict[str, Any]]:
        """Key -> answers; a half-written last line is cut off."""
        file = self.path / LINES
        if not file.exists():
            return {}
        whole, _, rest = file.read_bytes().rpartition(b"\n")
        if rest:
            os.truncate(file, len(whole) + 1 if whole else 0)
        return {entry["key"]: entry for entry in map(json.loads, whole.split(b"\n") if whole else ())}

    def append(self, key: str, answers: list[Answer]) -> None:
        entry = {
            "key": key,
            "right": [answer.right for answer in answers],
            "log_probability": [answer.log_probability for answer in answers],
        }
        with (self.path / LINES).open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry, allow_nan=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
