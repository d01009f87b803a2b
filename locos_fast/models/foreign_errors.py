"""What other libraries raise while a model's files are read, as one ValueError in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

LONGEST = 400  # characters of another library's message


@contextlib.contextmanager
def one_value_error(what: str) -> Iterator[None]:
    """Everything raised inside becomes a ValueError that begins with `what`.

    Wide on purpose: a file with one wrong type makes these libraries raise almost any class, and the Rust of tokenizers
    panics with one that is no Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {first_line(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice; of a CPU's PyTorch has no class to say so, only its allocator's name."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def first_line(error: BaseException) -> str:
    """An error's message in one line: its first, the second too where the first only announces it; with the class's
    name where the message alone says too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    clear = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    return text if clear else f"{type(error).__name__}: {text}"
