"""Put the parts of one scan together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from locos_fast.scans.manifest import keys_of
from locos_fast.scans.result import Scan, conclude
from locos_fast.scans.store import DONE, Arrays, ScanFolder

BATCH = 256  # trials whose scores are in memory at a time


def merge(parts: Sequence[str | Path], out: str | Path) -> Scan:
    """Write the scan of which the folders `parts` hold shards into a new folder; returns it as `scan` does.

    A trial that several parts tried counts as it ended best. Raises ValueError for a folder that is no scan, for parts
    of different scans, saying what differs, and if no trial counts; FileExistsError if `out` holds results.
    """
    if not parts:
        raise ValueError("merge: expected at least one scan, got none")
    folders = [ScanFolder(Path(part)) for part in parts]
    manifest = folders[0].read_manifest()
    for folder in folders[1:]:
        folder.check_same(manifest)
    lines = [folder.lines() for folder in folders]
    target = ScanFolder(Path(out))
    with target.locked():
        target.begin(manifest, resume=False)
        taken: set[str] = set()
        for wanted in (True, False):  # trials that are done first, the others from wherever they were tried
            for folder, found in zip(folders, lines, strict=True):
                keys = [
                    key
                    for key in keys_of(manifest)
                    if key in found and key not in taken and (found[key]["status"] in DONE) is wanted
                ]
                taken.update(keys)
                for start in range(0, len(keys), BATCH):
                    _copy(folder, target, keys[start : start + BATCH])
        return conclude(target)


def _copy(source: ScanFolder, target: ScanFolder, keys: list[str]) -> None:
    lines = source.lines()
    scored = [key for key in keys if lines[key]["status"] == "scored"]
    stacks = source.read_arrays(scored)
    arrays: dict[str, Arrays] = {
        key: {name: stack[i] for name, stack in stacks.items()} for i, key in enumerate(scored)
    }
    target.append([lines[key] for key in keys], arrays)
