"""Put the parts of one scan together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locos_fast.scans.manifest import keys_of, united
from locos_fast.scans.result import Scan, conclude, nothing_counts
from locos_fast.scans.store import DONE, Arrays, ScanFolder

BATCH = 256  # trials whose scores are in memory at a time

Lines = dict[str, dict[str, Any]]


def merge(parts: Sequence[str | Path], out: str | Path) -> Scan:
    """Write the scan of which the folders `parts` hold shards into a new folder; returns it as `scan` does.

    It has the trials of all parts. One that several parts tried counts as it ended best: scored, gated out, else.
    Raises ValueError, before anything is written, for a folder that is no scan, for parts that are scored in different
    ways, saying what differs, for an `out` that is a part, and if no trial counts; FileExistsError if `out` holds
    results.
    """
    if not parts:
        raise ValueError("merge: expected at least one scan, got none")
    folders, target = [ScanFolder(Path(part)) for part in parts], ScanFolder(Path(out))
    _check_free(target, folders)
    manifest = united([folder.read_manifest() for folder in folders], [folder.path for folder in folders])
    lines = [folder.lines() for folder in folders]
    best = {key: number for key in keys_of(manifest) if (number := _best(key, lines)) is not None}
    if not any(lines[number][key]["status"] == "scored" for key, number in best.items()):
        ended = {key: lines[number][key] for key, number in best.items()}
        raise ValueError(f"merge: in all parts together {nothing_counts(manifest['trials'], ended)}")
    with target.locked():
        target.begin(manifest, resume=False)
        for number, folder in enumerate(folders):
            keys = [key for key, of in best.items() if of == number]
            for start in range(0, len(keys), BATCH):
                _copy(folder, lines[number], target, keys[start : start + BATCH])
        return conclude(target)


def _check_free(target: ScanFolder, parts: list[ScanFolder]) -> None:
    if any(part.path.resolve() == target.path.resolve() for part in parts):
        raise ValueError(f"out: expected a new folder, got {target.path}, which is one of the parts")
    if target.manifest_file.exists():
        raise FileExistsError(f"{target.path} already holds a scan; choose another folder")
    target.check_free(resume=False)


def _best(key: str, lines: list[Lines]) -> int | None:
    """The part in which a trial ended best, the first of several; None if it was tried in none."""
    tried = [number for number, found in enumerate(lines) if key in found]
    rank = {status: number for number, status in enumerate(DONE)}
    return min(tried, key=lambda number: rank.get(lines[number][key]["status"], len(rank)), default=None)


def _copy(source: ScanFolder, lines: Lines, target: ScanFolder, keys: list[str]) -> None:
    scored = [key for key in keys if lines[key]["status"] == "scored"]
    stacks = source.read_arrays(scored, lines)
    arrays: dict[str, Arrays] = {
        key: {name: stack[i] for name, stack in stacks.items()} for i, key in enumerate(scored)
    }
    target.append([lines[key] for key in keys], arrays)
