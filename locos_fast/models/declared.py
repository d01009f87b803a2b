"""What config.json declares, read and judged before any object is built from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.quantizers import AutoHfQuantizer

MOST_MODULES = 10_000  # layers, or experts of a layer; each is a Python object, built even where no memory is taken
COUNTS = re.compile(r"(layers?|experts?)$")


def read_declared(place: str, revision: str | None) -> dict[str, Any]:
    """config.json of a folder or a hub id. Raises what transformers raises, and ValueError if it is no object."""
    declared, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
    if not isinstance(declared, dict):
        raise ValueError(f"expected an object, got {type(declared).__name__}")
    return declared


def tokenizer_code(place: str, revision: str | None) -> Any:
    """What the tokenizer asks to be run, or None."""
    declared = get_tokenizer_config(place, revision=revision)
    return declared.get("auto_map")


def check_declared(declared: Mapping[str, Any], attn_implementation: str | None, *, trust_remote_code: bool) -> None:
    """Raises ValueError for a model too large to be built, quantised in a way that transformers would silently skip,
    or whose attention is code to be fetched from the hub."""
    for name, count in _counts(declared):
        if count > MOST_MODULES:
            raise ValueError(f"model: config.json: {name}: expected at most {MOST_MODULES}, got {count}")
    quantised = declared.get("quantization_config")
    if quantised is not None and not (isinstance(quantised, dict) and AutoHfQuantizer.supports_quant_method(quantised)):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"model: config.json: quantization_config: {method!r} is unknown; its weights would be misread"
        )
    attention = attn_implementation
    if attention is None:
        attention = declared.get("_attn_implementation") or declared.get("attn_implementation")
    if isinstance(attention, str) and "/" in attention and not trust_remote_code:
        raise ValueError(
            f"model: attention implementation {attention!r} is code from the hub, not run without --trust-remote-code"
        )


def _counts(declared: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    for name, value in declared.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{path}{name}.")
        elif isinstance(value, (int, float)) and COUNTS.search(str(name)):
            yield f"{path}{name}", int(value) if value == value and abs(value) != float("inf") else MOST_MODULES + 1
