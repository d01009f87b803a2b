"""The safetensors files of a model folder, as files: which tensor lies where, and zeroing parts of one in place.

Nothing is loaded: a header says where the bytes of each tensor are, so types that no library here knows pass through.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from locos_fast.models.foreign_errors import one_value_error

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # all bits zero is 0.0, and no scale stands beside them
LENGTH_BYTES = 8  # the file begins with the length of its header, little-endian


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    name: str
    file: Path
    dtype: str  # as safetensors calls it: "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file


class Weights(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint by name, and its files."""

    def __init__(self, tensors: Mapping[str, StoredTensor], files: list[Path]) -> None:
        self._tensors, self.files = tensors, files

    @classmethod
    def of(cls, folder: Path, model: str) -> Weights:
        """Of the file or files that transformers would load; `model` is what errors call it.

        Raises ValueError for a folder without safetensors, and for files that are missing or damaged.
        """
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            with one_value_error(f"model: cannot read {INDEX} of {model!r}"):
                names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        else:
            raise ValueError(f"model: {model!r} has no {SINGLE} and no {INDEX}; other files of weights are not masked")
        if wrong := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise ValueError(f"model: {model!r} lacks the file {wrong[0]!r}, which its {INDEX} names")
        files = [folder / name for name in names]
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            with one_value_error(f"model: cannot read {file}"):
                tensors |= {tensor.name: tensor for tensor in stored_tensors(file)}
        return cls(tensors, files)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises what safetensors raises for a file that is none."""
    with safe_open(file, framework="np"):
        pass  # it checks that header and file fit together
    with file.open("rb") as content:
        length = int.from_bytes(content.read(LENGTH_BYTES), "little")
        header: dict[str, Any] = json.loads(content.read(length))
    header.pop("__metadata__", None)
    return [
        StoredTensor(
            name, file, entry["dtype"], tuple(entry["shape"]), LENGTH_BYTES + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    ]


def zero_slices(file: Path, tensor: StoredTensor, slices: Iterable[slice], axis: int) -> None:
    """Set slices of a matrix, of a type in `FLOAT_BYTES`, to zero in `file`, a copy of the file that it lies in."""
    number = np.dtype(f"<u{FLOAT_BYTES[tensor.dtype]}")
    matrix = np.memmap(file, dtype=number, mode="r+", offset=tensor.offset, shape=tensor.shape)
    for part in slices:
        matrix[(slice(None),) * axis + (part,)] = 0
    matrix.flush()
