"""What a scan is going to do: its configuration and its trials, each under an id that never changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from locos_fast.prompts.trials import Trial

SCHEMA_VERSION = 1


def trial_key(trial: Trial, config: dict[str, Any]) -> str:
    """The stable id of a trial under a configuration: a hash of everything that its scores depend on."""
    what = {
        "config": config,
        "prompt_ids": trial.prompt_ids,
        "needle_span": list(trial.needle_span),
        "answer_ids": trial.answer_ids,
        "question_span": trial.question_span and list(trial.question_span),
        "lead_tokens": trial.lead_tokens,
        "foil_ids": trial.foil_ids,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All trials of a scan, in its order; written before the first one is run.

    config  what the scores depend on: model and revision, dtype, attention, data set, protocol, norm (JSON)
    keys    the id of each trial
    trials  the trials
    """

    config: dict[str, Any]
    keys: list[str]
    trials: list[Trial]

    @classmethod
    def of(cls, config: dict[str, Any], trials: Sequence[Trial]) -> Manifest:
        """Raises ValueError for no trials, or if two are the same."""
        if not trials:
            raise ValueError("trials: expected at least one, got none")
        keys = [trial_key(trial, config) for trial in trials]
        if len(set(keys)) != len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f"trials: {trials[keys.index(twice)].id!r} is there twice")
        return cls(config, keys, list(trials))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Prompts are not kept: they are composed again, and their ids are in the keys."""
        entries = [
            {
                "key": key,
                "id": trial.id,
                "tokens": trial.length,
                "length": trial.requested_length or trial.length,
                "depth": trial.depth if trial.requested_depth is None else trial.requested_depth,
                "question": trial.question,
                "needle": trial.needle,
                "answer": trial.answer,
            }
            for key, trial in zip(self.keys, self.trials, strict=True)
        ]
        return {"schema_version": SCHEMA_VERSION, "config": self.config, "trials": entries}


def keys_of(manifest: dict[str, Any]) -> list[str]:
    """The trials' ids in a manifest as it is kept."""
    return [entry["key"] for entry in manifest["trials"]]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In what two configurations differ, in one line; None if in nothing."""
    changed = [
        f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return "; ".join(changed) or None


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `number` (from 0) of `count` parts of a scan."""

    number: int
    count: int

    @classmethod
    def parse(cls, given: str) -> Shard:
        """Read "i/n", with i from 1 to n. Raises ValueError for all else."""
        first, _, second = given.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise ValueError(f"shard: expected I/N with I from 1 to N, got {given!r}")
        return cls(int(first) - 1, int(second))

    def slice_of(self, order: Sequence[int]) -> list[int]:
        """This shard's part of the trials in walking order, so that what shares a beginning stays together."""
        low, high = (len(order) * i // self.count for i in (self.number, self.number + 1))
        return list(order[low:high])
