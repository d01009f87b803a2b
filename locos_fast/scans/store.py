"""The folder of a scan: whatever happens to the process, what was computed is there and counts once.

manifest.json        configuration and trials, written before the first trial is run
trials.jsonl         one line a trial that came to an end, appended; the last line of a trial counts
arrays/N.safetensors the scores of the trials of one batch, written before their lines
config.json, scores.safetensors   the means, written at the end and after every run (`HeadScores.from_pretrained`)
lock                 held while a process works on the folder
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from locos_fast.scans.manifest import SCHEMA_VERSION, difference, keys_of
from locos_fast.scoring.head_scores import SCORES

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

Status = Literal["scored", "gated", "out-of-memory", "failed"]
DONE: tuple[Status, ...] = ("scored", "gated")  # what a rerun does not try again

Arrays = Mapping[str, NDArray]


class ScanFolder:
    """One scan on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_file, self.lines_file = path / "manifest.json", path / "trials.jsonl"
        self.arrays = path / "arrays"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises FileExistsError, inside no context, if another process works on the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FileExistsError(f"{self.path}: another process is working on this scan") from error
            yield

    def begin(self, manifest: dict[str, Any], *, resume: bool) -> str | None:
        """Write the manifest, or check that the one here is the same; returns what was repaired, if anything.

        Raises FileExistsError if the folder holds a scan and `resume` is False, or other results, and ValueError,
        saying what differs, if it was begun with another configuration or other trials.
        """
        self.check_free(resume=resume)
        if not self.manifest_file.exists():
            _write_atomically(self.manifest_file, manifest)
            return None
        self.check_same(manifest)
        return self.repair()

    def check_free(self, *, resume: bool) -> None:
        """Raises FileExistsError if the folder holds a scan and `resume` is False, or other results."""
        if not self.manifest_file.exists():
            SCORES.check(self.path, overwrite=False)
        elif not resume:
            raise FileExistsError(f"{self.path} already holds a scan; --resume continues it, or choose another folder")

    def check_same(self, manifest: dict[str, Any]) -> None:
        """Raises ValueError, saying what differs, unless the folder's scan has this manifest."""
        before = self.read_manifest()
        if changed := difference(before["config"], manifest["config"]):
            raise ValueError(f"{self.path} holds a scan with another configuration: {changed}")
        if keys_of(before) != keys_of(manifest):
            raise ValueError(f"{self.path} holds a scan with the same configuration but other trials")

    def read_manifest(self) -> dict[str, Any]:
        """Raises ValueError if this is no scan that this version reads."""
        try:
            found = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} is no scan: its manifest.json cannot be read ({error})") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{self.path}: expected a scan of schema version {SCHEMA_VERSION}, got {version}")
        return found

    def repair(self) -> str | None:
        """Cut off a last line that a killed process left half-written; returns a sentence about it."""
        if not self.lines_file.exists():
            return None
        content = self.lines_file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) == len(content):
            return None
        os.truncate(self.lines_file, len(whole))
        return f"{self.lines_file}: its last line was half-written and is cut off; that trial is run again"

    def append(self, lines: list[dict[str, Any]], arrays: dict[str, Arrays]) -> None:
        """Add trials that came to an end. `arrays`: key of each scored trial -> its arrays."""
        if arrays:
            self.arrays.mkdir(exist_ok=True)
            number = 1 + max((int(file.stem) for file in self.arrays.glob("*.safetensors")), default=-1)
            file = self.arrays / f"{number:06d}.safetensors"
            scratch = file.with_suffix(".writing")
            save_file({f"{key}/{name}": array for key, of in arrays.items() for name, array in of.items()}, scratch)
            os.replace(scratch, file)
            lines = [line | _where(arrays.get(line["key"]), file) for line in lines]
        with self.lines_file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            out.flush()
            os.fsync(out.fileno())

    def lines(self) -> dict[str, dict[str, Any]]:
        """Key -> the last line of each trial that came to an end. Raises ValueError, with the line number, for a broken
        file."""
        found: dict[str, dict[str, Any]] = {}
        if not self.lines_file.exists():
            return found
        whole, _, _ = self.lines_file.read_bytes().rpartition(b"\n")  # what stands behind it was never finished
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                entry = json.loads(line)
                if entry["status"] not in get_args(Status):
                    raise ValueError(f"unknown status {entry['status']!r}")
                found[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.lines_file}, line {number}: no trial ({error})") from error
        return found

    def read_arrays(self, keys: list[str]) -> dict[str, NDArray[np.float32]]:
        """Name -> (trials, layers, heads) of the trials with these keys, in their order; NaN for a trial of which a
        detector says nothing."""
        lines = self.lines()
        found: list[dict[str, NDArray]] = []
        with contextlib.ExitStack() as files:
            opened: dict[str, Any] = {}
            for key in keys:
                name = lines[key]["arrays"]
                if name not in opened:
                    opened[name] = files.enter_context(safe_open(self.arrays / name, "np"))
                found.append({array: opened[name].get_tensor(f"{key}/{array}") for array in lines[key]["names"]})
        names = list(dict.fromkeys(name for arrays in found for name in arrays))
        nothing: Any = np.full_like(next(iter(found[0].values())), np.nan) if names else None
        return {name: np.stack([arrays.get(name, nothing) for arrays in found]) for name in names}


def _where(arrays: Arrays | None, file: Path) -> dict[str, Any]:
    return {} if arrays is None else {"arrays": file.name, "names": list(arrays)}


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)
