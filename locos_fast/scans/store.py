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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from locos_fast.scans.manifest import continued, what_is_wrong
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
            except BlockingIOError as error:
                raise FileExistsError(f"{self.path}: another process is working on this scan") from error
            except OSError:
                pass  # a file system without locks
            yield

    def begin(self, manifest: dict[str, Any], *, resume: bool) -> str | None:
        """Write the manifest, which may add trials to the one here; returns what was repaired, if anything.

        Raises FileExistsError if the folder holds a scan and `resume` is False, or other results, and ValueError,
        saying what differs, if its trials are scored in another way or are not among those of the manifest.
        """
        self.check_free(resume=resume)
        if not self.manifest_file.exists():
            write_atomically(self.manifest_file, manifest)
            return None
        before = self.read_manifest()
        now = continued(before, json.loads(json.dumps(manifest)), self.path)
        repaired = self.repair()
        if now != before:
            write_atomically(self.manifest_file, now)
        return "; ".join(filter(None, [repaired, self.what_is_unreadable()])) or None

    def check_free(self, *, resume: bool) -> None:
        """Raises FileExistsError if the folder holds a scan and `resume` is False, or other results."""
        if not self.manifest_file.exists():
            SCORES.check(self.path, overwrite=False)
        elif not resume:
            raise FileExistsError(f"{self.path} already holds a scan; --resume continues it, or choose another folder")

    def read_manifest(self) -> dict[str, Any]:
        """Raises ValueError if this is no scan that this version reads."""
        try:
            found = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} is no scan: its manifest.json cannot be read ({error})") from error
        if wrong := what_is_wrong(found):
            raise ValueError(f"{self.path}: {wrong}")
        return found

    def share_prefixes(self) -> bool | None:
        """Whether the scan here lets trials continue from shared beginnings; None if there is none or it is not known.

        Raises ValueError if this is no scan that this version reads.
        """
        return self.read_manifest().get("share_prefixes") if self.manifest_file.exists() else None

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
            there = (file.stem for file in self.arrays.glob("[0-9]*.safetensors"))
            number = 1 + max((int(stem) for stem in there if stem.isdecimal()), default=-1)
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
        """Key -> the last line of each trial that came to an end and, if it counts, whose scores can be read.

        Raises ValueError, with the line number, for a broken file.
        """
        found = self._all_lines()
        unreadable = self._unreadable(found)
        return {key: line for key, line in found.items() if key not in unreadable}

    def what_is_unreadable(self) -> str | None:
        """A sentence about trials whose scores are lost; None if none are."""
        lost = self._unreadable(self._all_lines())
        if not lost:
            return None
        why = next(iter(lost.values()))
        return f"the scores of {len(lost)} trials cannot be read, and those trials are open again ({why})"

    def _all_lines(self) -> dict[str, dict[str, Any]]:
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

    def _unreadable(self, lines: dict[str, dict[str, Any]]) -> dict[str, str]:
        """Key -> why, of the trials that count and whose scores are not where their line says."""
        held: dict[str, set[str] | str] = {}  # what a file has, or why it cannot be read
        found = {}
        for key, line in lines.items():
            if line["status"] != "scored":
                continue
            name, arrays = line.get("arrays"), line.get("names")
            if not isinstance(name, str) or not isinstance(arrays, list) or not arrays:
                found[key] = f"{self.lines_file}: the line of {line.get('id', key)} names no arrays"
                continue
            if name not in held:
                held[name] = self._held_by(name)
            if isinstance(there := held[name], str):
                found[key] = there
            elif missing := [array for array in arrays if f"{key}/{array}" not in there]:
                found[key] = f"{self.arrays / name} lacks {missing[0]} of {line.get('id', key)}"
        return found

    def _held_by(self, name: str) -> set[str] | str:
        try:
            with safe_open(self.arrays / name, "np") as file:
                return set(file.keys())
        except (OSError, SafetensorError) as error:
            return f"{self.arrays / name}: {error}"

    def read_arrays(
        self, keys: list[str], lines: dict[str, dict[str, Any]] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Name -> (trials, layers, heads) of the trials with these keys, in their order; NaN for a trial of which a
        detector says nothing.

        lines: as `lines` has them, if they are at hand.
        """
        lines = self.lines() if lines is None else lines
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


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader finds all of it or what was there before."""
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)
