"""What a scan is going to do: its configuration and its trials, each under an id that never changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locos_fast.prompts.trials import Trial

SCHEMA_VERSION = 1


# Of a configuration, what the scores of a trial depend on besides its tokens, and which trials count. `contexts` and
# `needles_per_context` are modes that are never mixed. All else describes: device, versions, paths, data set, grid.
SCORING = (
    *("protocol", "gate", "norm", "max_new_tokens", "max_thinking_tokens", "tuned_lens_sha256", "cri"),
    *("weights", "architecture", "dtype", "attn_implementation", "contexts", "needles_per_context"),
)
EARLIER = "earlier"  # in a configuration: what was described otherwise when other trials of the scan were run


def scoring_identity(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration scores depend on."""
    return {name: config[name] for name in SCORING if name in config}


def trial_key(trial: Trial, config: dict[str, Any]) -> str:
    """The stable id of a trial under a configuration: a hash of everything that its scores depend on."""
    what = {
        "config": scoring_identity(config),
        "prompt_ids": trial.prompt_ids,
        "needle_span": list(trial.needle_span),
        "answer_ids": trial.answer_ids,
        "answer": trial.answer,  # which a generated reply is compared with
        "question_span": trial.question_span and list(trial.question_span),
        "lead_tokens": trial.lead_tokens,
        "foil_ids": trial.foil_ids,
    }
    return _digest(what)


def context_of(trial: Trial) -> str:
    """The id of what stands before the question: trials that share it are no independent samples."""
    end = len(trial.prompt_ids) if trial.question_span is None else trial.question_span[0]
    return _digest(trial.prompt_ids[:end])


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All trials of a scan, in its order; written before the first one is run.

    config          what the scores depend on (`SCORING`), and what else describes the scan: data set, device ... (JSON)
    keys            the id of each trial
    trials          the trials
    share_prefixes  whether trials continue from shared beginnings, which changes rounding; None if that is not known
    """

    config: dict[str, Any]
    keys: list[str]
    trials: list[Trial]
    share_prefixes: bool | None = None

    @classmethod
    def of(cls, config: dict[str, Any], trials: Sequence[Trial], *, share_prefixes: bool | None = None) -> Manifest:
        """Raises ValueError for no trials, or if two are the same."""
        if not trials:
            raise ValueError("trials: expected at least one, got none")
        keys = [trial_key(trial, config) for trial in trials]
        if len(set(keys)) != len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f"trials: {trials[keys.index(twice)].id!r} is there twice")
        return cls(config, keys, list(trials), share_prefixes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Prompts are not kept: they are composed again, and their ids are in the keys."""
        entries = [
            {
                "key": key,
                "id": trial.id,
                "context": context_of(trial),
                "tokens": trial.length,
                "length": trial.requested_length or trial.length,
                "depth": trial.depth if trial.requested_depth is None else trial.requested_depth,
                "question": trial.question,
                "needle": trial.needle,
                "answer": trial.answer,
            }
            for key, trial in zip(self.keys, self.trials, strict=True)
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "config": self.config,
            "share_prefixes": self.share_prefixes,
            "trials": entries,
        }


def keys_of(manifest: dict[str, Any]) -> list[str]:
    """The trials' ids in a manifest as it is kept."""
    return [entry["key"] for entry in manifest["trials"]]


def what_is_wrong(manifest: Any) -> str | None:
    """In what a manifest that was read is none, in a few words; None if in nothing."""
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        return f"expected a scan of schema version {SCHEMA_VERSION}, got {version}"
    if not isinstance(manifest.get("config"), dict):
        return "its manifest.json has no config"
    entries = manifest.get("trials")
    if not isinstance(entries, list) or not entries:
        return "its manifest.json has no trials"
    fields = {"key": str, "id": str, "answer": str, "length": int, "depth": int | float}
    for number, entry in enumerate(entries, 1):
        for field, kind in fields.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                return f"trial {number} of its manifest.json has no {field}"
    return None


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In what two configurations differ, in one line; None if in nothing."""
    changed = [
        f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted({*before, *now} - {EARLIER})
        if before.get(name) != now.get(name)
    ]
    return "; ".join(changed) or None


def check_same_scoring(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raises ValueError, saying what differs, unless trials of the two manifests are scored alike."""
    if changed := difference(scoring_identity(before["config"]), scoring_identity(now["config"])):
        raise ValueError(f"{where} holds a scan with another configuration: {changed}")


def continued(before: dict[str, Any], now: dict[str, Any], where: Path) -> dict[str, Any]:
    """The manifest of a scan that `now` goes on with: the same trials or more, scored in the same way.

    What was described otherwise is kept beside (`EARLIER`). Raises ValueError, saying what differs, for another scan.
    """
    check_same_scoring(before, now, where)
    if gone := set(keys_of(before)) - set(keys_of(now)):
        changed = difference(before["config"], now["config"])
        raise ValueError(
            f"{where} holds trials that are not among those asked for ({len(gone)} of {len(keys_of(before))})"
            + (f": {changed}" if changed else "")
            + "; scans of different trials are put together by merge"
        )
    shared = before.get("share_prefixes") if now.get("share_prefixes") is None else now["share_prefixes"]
    return {**now, "config": _with_earlier(now["config"], [before["config"]]), "share_prefixes": shared}


def united(manifests: Sequence[dict[str, Any]], places: Sequence[Path]) -> dict[str, Any]:
    """The manifest of the trials of several scans: in the order of the first, then what the others add.

    Raises ValueError, saying what differs, unless all are scored in the same way.
    """
    first = manifests[0]
    for manifest, place in zip(manifests[1:], places[1:], strict=True):
        check_same_scoring(first, manifest, place)
    entries = {entry["key"]: entry for manifest in reversed(manifests) for entry in manifest["trials"]}
    order = dict.fromkeys(key for manifest in manifests for key in keys_of(manifest))
    shared = {manifest.get("share_prefixes") for manifest in manifests}
    return {
        **first,
        "config": _with_earlier(first["config"], [manifest["config"] for manifest in manifests[1:]]),
        "share_prefixes": shared.pop() if len(shared) == 1 else None,
        "trials": [entries[key] for key in order],
    }


def _with_earlier(config: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A configuration, and in what others differ from it."""
    found: list[dict[str, Any]] = list(config.get(EARLIER, []))
    own = {name: value for name, value in config.items() if name != EARLIER}
    for other in others:
        described = {name: value for name, value in other.items() if name != EARLIER and own.get(name) != value}
        found += [entry for entry in (*other.get(EARLIER, []), described) if entry and entry not in found]
    return own | ({EARLIER: found} if found else {})


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
