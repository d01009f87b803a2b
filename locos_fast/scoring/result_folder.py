"""Folders of results: told from other folders, never written over by accident, complete or without a config.json.

config.json holds the hashes of the files beside it, so that whoever reads while another writes never takes one result's
config for the other's numbers; where the file system has locks, readers and writers take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
HASHES = "files_sha256"


class ResultKind(NamedTuple):
    """What a folder of results holds."""

    what: str  # "scores"
    schema: str  # the key of config.json that marks it
    version: int
    files: tuple[str, ...]  # config.json last: with it a folder is complete
    picture: str  # what the command line draws beside them
    folder: str  # "a score folder"

    def check(self, folder: Path, *, overwrite: bool) -> None:
        """Raises FileExistsError for a file, for a folder with anything else's config.json, and, unless `overwrite`,
        for one with a file that would be replaced."""
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, not a folder")
        if not self._is_free(folder):
            raise FileExistsError(f"{folder} holds a config.json that is not of {self.what}; choose another folder")
        if overwrite:
            return
        if taken := [name for name in (*self.files, self.picture) if os.path.lexists(folder / name)]:
            raise FileExistsError(
                f"{folder} already holds {self.what} ({', '.join(taken)}); choose another folder or overwrite them"
            )

    def write(self, folder: Path, content: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
        """Write config.json and the other files, by name; all of them are complete, or there is no config.json."""
        own = {self.schema: self.version, HASHES: {name: _hash(data) for name, data in content.items()}}
        config = json.dumps({self.schema: self.version, **meta} | own, indent=2, allow_nan=False) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        try:
            for name, data in {**content, CONFIG: config.encode()}.items():
                (scratch / name).write_bytes(data)
            with _lock(folder, exclusive=True):
                (folder / CONFIG).unlink(missing_ok=True)  # new results never stand beside an old config
                for name in self.files:
                    os.replace(scratch / name, folder / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def read(self, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What `write` was given: meta, and the content of the files by name.

        Raises FileNotFoundError for a missing file; ValueError for a config.json that is none of this kind, and for
        files that it does not describe. A folder without hashes, as older releases wrote them, is read as it is.
        """
        with _lock(folder, exclusive=False):
            for name in (CONFIG, *self.files):
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder} is not {self.folder}: it has no {name}")
            content = {name: (folder / name).read_bytes() for name in self.files}
        try:
            meta = json.loads(content.pop(CONFIG).decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder} is not {self.folder}: its config.json is no JSON: {error}") from error
        version = meta.pop(self.schema, None) if isinstance(meta, dict) else None
        if version != self.version or isinstance(version, bool):
            name = self.schema.replace("_", " ")
            raise ValueError(f"{folder}: expected {name} {self.version}, got {version}")
        hashes = meta.pop(HASHES, None)
        for name, data in content.items():
            if hashes is not None and (not isinstance(hashes, dict) or hashes.get(name) != _hash(data)):
                raise ValueError(
                    f"{folder} is not {self.folder}: its {name} is not the one that its config.json describes; another "
                    "process is writing it, or a file has changed since"
                )
        return meta, content

    def _is_free(self, folder: Path) -> bool:
        """Whether there is no config.json, or one of these results: many a config.json has a schema version."""
        try:
            config = json.loads((folder / CONFIG).read_bytes().decode())
        except FileNotFoundError:
            return not (folder / CONFIG).is_symlink()  # one that leads nowhere; another writer's may be back by now
        except (ValueError, RecursionError):
            return False
        return isinstance(config, dict) and self.schema in config and (folder / self.files[0]).exists()


@contextlib.contextmanager
def _lock(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the folder for one writer or for readers; where there are no locks, the hashes tell of a mixture."""
    if fcntl is None or not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_writable(folder: Path) -> None:
    """Raises OSError if the folder, or what is missing of its path, cannot be made and written to; leaves no trace."""
    made = []
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    finally:
        for part in reversed(made):
            part.rmdir()


def tensor_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file. Written as bytes it gets the mode that the umask gives; `save_file` makes it 0600."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file. Raises ValueError for what is none, and for types that numpy does not have."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors file of types that numpy has ({type(error).__name__}: {error})") from error
