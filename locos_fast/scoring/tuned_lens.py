"""Tuned-lens directions: what a head writes, read through the translator of its layer (arXiv 2303.08112).

A tuned lens maps the residual stream h at layer l to what the last layer would have made of it,

    h -> h + A_l h + b_l        so that        d . lens(h) = (d + A_l^T d) . h + d . b_l

Scores through a lens, as aryopg/locos has them, take both into each position's contribution,

    phi[t, j, h] = alpha[t, j, h] * (w'[t, h] . v[j, h // G] + d[t] . b_l)        w' = W_O^T (d + A_l^T d)

and are otherwise those of `detectors`. Summed, with the head output and the masses that a recording keeps:

    L+ = w' . span output + mass * (d . b_l)        total = w' . head output + total mass * (d . b_l)
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.architecture import attention_layers, layer_count, unembedding
from locos_fast.models.foreign_errors import first_line
from locos_fast.scoring.directions import pull_back

FLAT_NAME = re.compile(r"(?:layer_translators\.)?(\d+)\.(weight|bias)")
LAYOUTS = 'layer -> {"A", "b"}, or "0.weight", "0.bias", "1.weight", ... of the tuned-lens library'

# published files keep losses beside the matrices, as numbers of NumPy; `scalar` is known by two names
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?"))),
]


class TunedLens:
    """The translators of one model's layers; `TunedLens.load` reads a file."""

    def __init__(self, translators: Mapping[int, tuple[Tensor, Tensor]], *, source: str = "translators") -> None:
        """translators: layer -> (A, b) of h -> h + A h + b, (hidden, hidden) and (hidden,) of a floating dtype.

        source: what errors name. Raises ValueError for a translator of another shape or dtype than the first.
        """
        self.source = source
        if not translators:
            raise ValueError(f"{source}: expected translators, got none")
        self.hidden = _hidden(source, translators)
        self._translators = {number: _linear(A, b) for number, (A, b) in sorted(translators.items())}

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> TunedLens:
        """Read a published lens: a .pt file, from which no code is run, or .safetensors.

        A .pt file holds layer -> {"A", "b"}, A being the whole matrix, from which the identity is taken here, perhaps
        under the name "translators"; or, as .safetensors do, "0.weight", "0.bias", "1.weight", ..., the residual form
        of the tuned-lens library, perhaps beginning with "layer_translators.".
        device: where the matrices are kept and multiplied.
        Raises ValueError, naming the file and the layer, for files that cannot be read or hold anything else.
        """
        data = _read(Path(path), device)
        if isinstance(data, dict) and isinstance(data.get("translators"), dict):
            data = data["translators"]
        if not isinstance(data, dict) or not data:
            raise ValueError(f"{path}: expected a tuned lens ({LAYOUTS}), got {_described(data)}")
        if all(isinstance(name, int) or str(name).isdigit() for name in data):
            return cls(_whole(path, data), source=str(path))
        return cls(_residual(path, data), source=str(path))

    @property
    def layers(self) -> list[int]:
        """The layers that have a translator."""
        return list(self._translators)

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError, naming the file and the layer, unless every softmax-attention layer of the model has a
        translator of its hidden size. One for what the last layer returns may follow them, more may not."""
        needed = [layer.number for layer in attention_layers(model)]
        missing = [str(number) for number in needed if number not in self._translators]
        if missing:
            raise ValueError(f"{self.source}: expected a translator for each layer, got none for {', '.join(missing)}")
        if self.layers[-1] > layer_count(model):
            raise ValueError(
                f"{self.source}: expected the translators of {layer_count(model)} layers, got one for layer "
                f"{self.layers[-1]}: it is another model's lens"
            )
        head: Any = unembedding(model)
        hidden = int(head.weight.shape[1])
        if self.hidden != hidden:
            raise ValueError(
                f"{self.source}: layer {self.layers[0]}: expected ({hidden}, {hidden}), the model's hidden size, got "
                f"({self.hidden}, {self.hidden})"
            )

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the translators."""
        found = hashlib.sha256()
        for number, linear in self._translators.items():
            for tensor in (linear.weight, linear.bias):
                found.update(f"{number} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def direction(self, layer: int, d: Tensor) -> Tensor:
        """d + A^T d, (T, hidden) in the dtype and on the device of `d`, which is float32, or float64."""
        return d + pull_back(self._translator(layer), d).to(d)

    def bias(self, layer: int, d: Tensor) -> Tensor:
        """d . b, (T,) in the dtype and on the device of `d`."""
        return d @ self._translator(layer).bias.to(d)

    def _translator(self, layer: int) -> nn.Linear:
        if layer not in self._translators:
            raise ValueError(f"{self.source}: expected a translator for layer {layer}, got none")
        return self._translators[layer]


def _read(path: Path, device: str | torch.device) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: expected a tuned lens, a .pt or .safetensors file, got {_place(path)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to allow it
        raise ValueError(
            f"{path}: holds more than tensors and numbers, which can be code, and is not loaded"
        ) from error
    except Exception as error:  # a broken file makes either library raise almost anything
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error


def _place(path: Path) -> str:
    return "a folder" if path.is_dir() else "no such file"


def _whole(path: str | Path, data: dict) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> {"A", "b"}, A with the identity."""
    translators = {}
    for name, entry in data.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(part), Tensor) for part in ("A", "b")):
            raise ValueError(f'{path}: layer {name}: expected tensors "A" and "b", got {_described(entry)}')
        A, b = entry["A"], entry["b"]
        if A.ndim != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"{path}: layer {name}: expected a square matrix, got {tuple(A.shape)}")
        A = A.to(torch.promote_types(A.dtype, torch.float32), copy=True)
        A.diagonal().sub_(1)
        translators[int(name)] = (A, b)
    return translators


def _residual(path: str | Path, data: dict) -> dict[int, tuple[Tensor, Tensor]]:
    """ "{layer}.weight", "{layer}.bias", beside which the tuned-lens library may keep its unembedding."""
    parts: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in data.items():
        match = FLAT_NAME.fullmatch(str(name))
        if match and isinstance(tensor, Tensor):
            parts[int(match[1])][match[2]] = tensor
    if not parts:
        raise ValueError(f"{path}: expected a tuned lens ({LAYOUTS}), got {_described(data)}")
    for number, both in parts.items():
        for part in ("weight", "bias"):
            if part not in both:
                raise ValueError(f"{path}: layer {number}: expected {number}.{part}, got none")
    return {number: (both["weight"], both["bias"]) for number, both in parts.items()}


def _hidden(source: str, translators: Mapping[int, tuple[Tensor, Tensor]]) -> int:
    """The size that all translators have."""
    first = next(iter(translators.values()))[0]
    hidden = len(first) if first.ndim else 0
    for number, (A, b) in translators.items():
        for x, shape in ((A, (hidden, hidden)), (b, (hidden,))):
            if x.shape != shape or not x.is_floating_point():
                raise ValueError(f"{source}: layer {number}: expected {shape} floating, got {tuple(x.shape)} {x.dtype}")
            if not bool(x.isfinite().all()):
                raise ValueError(f"{source}: layer {number}: holds NaN or infinity")
    return hidden


def _linear(A: Tensor, b: Tensor) -> nn.Linear:
    """h -> A h + b around the given tensors, so that `pull_back` reads A as it reads an output projection."""
    linear = nn.Linear(1, 1, device="meta")
    linear.in_features, linear.out_features = A.shape[1], A.shape[0]
    linear.weight, linear.bias = (nn.Parameter(x, requires_grad=False) for x in (A.detach(), b.detach()))
    return linear


def _described(data: Any) -> str:
    if not isinstance(data, dict):
        return type(data).__name__
    return f"a dict of {', '.join(repr(name) for name in list(data)[:4]) or 'nothing'}"
