"""What can be scored on a model, and how exactly: the library side of `locos-fast doctor`.

One short forward pass is recorded, traced and taken apart (see `logit_units`); how far the parts are from
the model's own logit is the proof that nothing between a head and the logit was forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits
from locos_fast.models.architecture import AttentionLayer, UnsupportedModelError, attention_layers, layer_count
from locos_fast.models.head_map import check_head_map
from locos_fast.models.residual_stream import trace
from locos_fast.ops.backends import backend_for
from locos_fast.scoring.directions import Target
from locos_fast.scoring.logit_units import Attribution, attribute_heads, completeness_of, finite
from locos_fast.scoring.recording import Recording, record

PROMPT_TOKENS = 32
ROWS = 8  # the last rows of the prompt, each toward the token that the model itself would give
HALF = (torch.float16, torch.bfloat16)

# Above these a residual, relative to the sum of absolute components, is no longer rounding. A float32 model stays below
# 1e-5 as a rule; 1e-3 leaves room for deep ones, and norms and softmax run in float32 inside a float64 model too. A
# half-precision stream is rounded to 1e-3 (float16) or 8e-3 (bfloat16) of itself at every layer, and is several times
# larger than what one layer writes.
ROUNDING = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
ROUNDING_FULL = 1e-3
PUBLISHED = "published score only"  # norm="none"
WRONG = 1e-1  # whatever the dtype: a tenth of the logit is unaccounted for


class LayerDiagnosis(NamedTuple):
    """One decoder layer: what it is, and how exactly its heads are scored."""

    number: int
    kind: str  # "full", "sliding 4096", "chunked 8192", "full (latent)", "sliding 8 (shared KV, sinks)", "linear" ...
    heads: int | None  # None, like the next three, where the layer has no softmax attention
    kv_heads: int | None
    head_dim: int | None  # of queries and keys
    value_dim: int | None
    residual: float | None  # heads + biases against the layer's write, relative; None where it could not be measured
    verdict: str  # "exact", "approximate", "wrong", "published score only" (norm="none") or "not scored"
    reason: str | None  # why it is not exact


class Diagnosis(NamedTuple):
    """What `diagnose` found out about a model."""

    model: str  # class name
    layers: list[LayerDiagnosis]
    verdict: str  # of the whole model: "exact", "approximate", "wrong" or "published score only"
    residual: float | None  # all components against the model's logit, relative
    softcap: float | None  # of the final logits; contributions are to the logit before it
    attn_implementation: str
    dtype: str
    backend: str  # that this machine would use
    completeness: dict[str, Any]  # the residuals as the `meta` of scores holds them, or why there are none
    frozen_refused: str | None  # why norm="frozen" is not available; None if it is

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain values, None for what is not finite."""
        fields = self._asdict() | {"residual": finite(self.residual)}
        del fields["completeness"]  # the same numbers
        fields["layers"] = [layer._asdict() | {"residual": finite(layer.residual)} for layer in self.layers]
        return fields


def diagnose(model: PreTrainedModel, input_ids: Tensor | None = None, backend: str = "auto") -> Diagnosis:
    """Find out, with one short forward pass, what each decoder layer is and how exactly its heads are scored.

    input_ids: (1, N) int64; random tokens, always the same, if not given.
    Raises UnsupportedModelError for models that cannot be recorded.
    """
    attention = {layer.number: layer for layer in attention_layers(model)}
    ids = random_prompt(model) if input_ids is None else input_ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected (1, N) with N >= 1, got {tuple(ids.shape)}")
    check_head_map(model, ids)
    recording, attribution, refused = _take_apart(model, ids, backend)
    layers = [
        _diagnose_layer(model, number, attention.get(number), recording, attribution)
        for number in range(layer_count(model))
    ]
    completeness = {"unavailable": refused} if attribution is None else completeness_of(attribution)
    return Diagnosis(
        model=type(model).__name__,
        layers=layers,
        verdict=verdict_of(completeness, model.dtype),
        residual=None if attribution is None else attribution.residual,
        softcap=None if attribution is None else attribution.softcap,
        attn_implementation=str(next(iter(attention.values())).module.config._attn_implementation),
        dtype=str(model.dtype).removeprefix("torch."),
        backend=backend_for(backend, next(iter(recording.values())).output).name,
        completeness=completeness,
        frozen_refused=refused,
    )


def verdict(residual: float | None, dtype: torch.dtype) -> str:
    """Of one residual in a model of `dtype`: "exact", "approximate" or "wrong"; None, not finite, is wrong."""
    if residual is not None and residual <= ROUNDING.get(dtype, ROUNDING_FULL):
        return "exact"
    return "approximate" if residual is not None and residual <= WRONG else "wrong"


def verdict_of(completeness: dict[str, Any], dtype: torch.dtype) -> str:
    """The verdict on scores whose `meta["completeness"]` this is.

    In half precision the layers do not count: a layer may write far less than the stream it is measured in is rounded
    by. Over the whole model that rounding is small against the sum of all components.
    """
    if "unavailable" in completeness:
        return PUBLISHED
    layers = [] if dtype in HALF else completeness["layers"].values()
    return _worst([completeness["overall"], *layers], dtype)


def doubt(completeness: dict[str, Any], dtype: torch.dtype) -> str | None:
    """One sentence on what is not exact in scores whose `meta["completeness"]` this is; None if nothing is."""
    judged = verdict_of(completeness, dtype)
    if judged == "exact":
        return None
    if judged == PUBLISHED:
        return str(completeness["unavailable"])
    layers = [r for r in completeness["layers"].values() if r is not None]
    known = [] if completeness["overall"] is None else [f"overall by {completeness['overall']:.1e}"]
    known += [f"in the worst layer by {max(layers):.1e}"] if layers else []
    return f"contributions miss the model's logit, relative to their size, {', '.join(known) or 'by no finite number'}"


def prompt_tokens(config: Any) -> int:
    """How many tokens a model of this configuration is examined with: fewer where it has no more positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(PROMPT_TOKENS, positions or PROMPT_TOKENS)


def random_prompt(model: PreTrainedModel, tokens: int | None = None) -> Tensor:
    """(1, tokens) random token ids, none of them one that the configuration gives a meaning (image tokens ...)."""
    embedding: Any = model.get_input_embeddings()
    text = model.config.get_text_config(decoder=True)
    allowed = torch.ones(min(int(text.vocab_size), len(embedding.weight)), dtype=torch.bool)
    for token in _special_tokens(model.config):
        if 0 <= token < len(allowed):
            allowed[token] = False
    choice = allowed.nonzero()[:, 0] if bool(allowed.any()) else torch.arange(len(allowed))
    tokens = prompt_tokens(model.config) if tokens is None else tokens
    drawn = torch.randint(len(choice), (1, tokens), generator=torch.Generator().manual_seed(0))
    return choice[drawn].to(embedding.weight.device)


@torch.inference_mode()
def _take_apart(
    model: PreTrainedModel, input_ids: Tensor, backend: str
) -> tuple[Recording, Attribution | None, str | None]:
    """The recording, and either what the logits are made of or the sentence that says why that cannot be told."""
    tokens = input_ids.shape[1]
    rows = list(range(max(0, tokens - ROWS), tokens))
    stream, refused = None, None
    with record(model, rows, [(0, 1)], backend=backend) as recording, contextlib.ExitStack() as hooks:
        try:
            stream = hooks.enter_context(trace(model, rows))
        except UnsupportedModelError as error:
            refused = str(error)
        logits = answer_logits(model, input_ids, rows)
    if stream is None:
        return recording, None, refused
    try:
        return recording, attribute_heads(model, stream, recording, Target(logits.argmax(-1)), logits), None
    except UnsupportedModelError as error:
        return recording, None, str(error)


def _diagnose_layer(
    model: PreTrainedModel,
    number: int,
    attention: AttentionLayer | None,
    recording: Recording,
    attribution: Attribution | None,
) -> LayerDiagnosis:
    config = model.config.get_text_config(decoder=True)
    kind = layer_kind(config, number, attention)
    if attention is None:
        return LayerDiagnosis(number, kind, *(None,) * 5, "not scored", "no softmax attention")
    _, _, heads, value_dim = recording[number].output.shape
    shape = (heads, _kv_heads(attention.module, config, heads), _head_dim(attention.module, value_dim), value_dim)
    if attribution is None:
        return LayerDiagnosis(number, kind, *shape, None, PUBLISHED, 'norm="frozen" is not available')
    residual = attribution.layers[number].residual
    judged = verdict(residual, model.dtype)
    return LayerDiagnosis(number, kind, *shape, residual, judged, _reason(judged, model.dtype))


def layer_kind(config: Any, number: int, attention: AttentionLayer | None) -> str:
    """What a decoder layer attends to, and what is special about it, in a few words.

    config: the text configuration. attention: None for a layer without softmax attention.
    """
    types = getattr(config, "layer_types", None)
    declared = types[number] if types else None
    if attention is None:
        return str(declared).removesuffix("_attention") if declared else "no softmax attention"
    features = ", ".join(_features(attention.module))
    return _reach(config, declared, attention.module) + (f" ({features})" if features else "")


def _reach(config: Any, declared: str | None, module: nn.Module) -> str:
    """Which keys a layer sees. Newer models declare it layer by layer; older ones have one window for all."""
    if declared is not None and "chunked" in declared:
        return f"chunked {config.attention_chunk_size}"
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    if window is not None and (declared is None or "sliding" in declared):
        return f"sliding {window}"
    return "full"


def _features(module: nn.Module) -> Iterator[str]:
    if getattr(module, "kv_lora_rank", None) is not None:
        yield "latent"
    if getattr(module, "is_kv_shared_layer", False):
        yield "shared KV"
    if getattr(module, "sinks", None) is not None:
        yield "sinks"


def _kv_heads(module: nn.Module, config: Any, heads: int) -> int:
    groups = getattr(module, "num_key_value_groups", None)
    return heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads


def _head_dim(module: nn.Module, value_dim: int) -> int:
    """Of queries and keys, by the names in use; latent attention gives them another size than values."""
    own = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size"))
    return next((int(size) for size in own if size), value_dim)


def _reason(judged: str, dtype: torch.dtype) -> str | None:
    if judged == "exact":
        return None
    if dtype in HALF:
        return f"{str(dtype).removeprefix('torch.')} cannot tell rounding from an error: check in float32"
    return "heads and biases do not add up to what the layer writes"


def _worst(residuals: Iterable[float | None], dtype: torch.dtype) -> str:
    verdicts = [verdict(residual, dtype) for residual in residuals]
    return next(v for v in ("wrong", "approximate", "exact") if v in verdicts)


def _special_tokens(config: Any) -> set[int]:
    """Ids of tokens that the configuration, or a part of it, gives a name."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "get_text_config"))]
    named = (
        value for part in parts for name, value in vars(part).items() if name.endswith(("token_id", "token_index"))
    )
    return {value for value in named if isinstance(value, int)}
