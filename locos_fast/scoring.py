"""Scoring: one teacher-forced forward pass, one recording, every detector.

    L+ = sum over the needle of phi        L- = n / (K - n) * sum over the other visible keys of phi        S = L+ - L-

with phi[t, j, h] = alpha[t, j, h] * (w[t, h] . v[j, h // G]), n needle keys and K keys in all visible to row t (LOCOS,
arXiv 2607.01002). The sum over all keys is w . head output, so the recording needs values only inside the needle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast._version import __version__
from locos_fast.answer_pass import answer_logits, check_prompt
from locos_fast.architecture import layer_count
from locos_fast.attribution import Attribution, attribute_heads
from locos_fast.cost import Meter
from locos_fast.directions import Target, head_directions, token_directions
from locos_fast.exact import exact
from locos_fast.head_scores import ARRAYS, HeadScores
from locos_fast.recording import LayerRecord, Recording, record
from locos_fast.residual_stream import StreamTrace, trace, trace_projections
from locos_fast.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.trials import Trial

NORMS = ("none", "frozen")

Span = tuple[int, int]


class Tokenizer(Protocol):
    """What scoring needs of a tokenizer."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


def score_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    needle_span: Span | Sequence[Span],
    answer_positions: Sequence[int],
    *,
    norm: str = "none",
    contrast: str | Sequence[int] | None = None,
    backend: str = "auto",
    verify: bool = False,
    token_chunk: int | None = TOKENS_PER_CHUNK,
) -> HeadScores:
    """Score every head on one prompt: LOCOS, DLA, attention-spatial and Wu's copy score from one forward pass.

    input_ids: (1, N) int64, the prompt followed by the answer (teacher forcing).
    needle_span: (start, end) token indices, half-open, or several of them, scored as their union.
    answer_positions: indices in `input_ids` of the answer tokens to score; row p - 1 predicts token p.
    norm: "none", the score as published: raw unembedding rows, no norm or multiplier folded in. "frozen", true logit
    units: everything between a head and the logit folded in, with the scales of this forward pass; the logit is the one
    before any final softcap. `meta["completeness"]` then says how exactly all contributions add up to the model's
    logit. backend: see `locos_fast.ops`. verify: check the recording against the head outputs, see `record`.
    token_chunk: MLPs and norms of longer prompts run that many tokens at a time, which changes no score beyond rounding
    and keeps their intermediates small; None runs them whole, see `token_chunks`.

    Scores are means over the answer rows that see at least one needle key (DLA: over all rows; Wu: a sum); a layer in
    which no row does is NaN in score, l_plus, l_minus and attention_spatial. A needle partly inside a layer's window
    counts with the part that is seen; `meta["needle_visible_share"]` keeps how much that was. `meta["cost"]` keeps the
    seconds of the forward pass and of scoring, and the peak memory above what was in use before, in bytes.
    Raises ValueError for arguments that do not fit and UnsupportedModelError for models that cannot be recorded.
    """
    check_norm(norm)
    spans = _union(needle_span)
    check_prompt(input_ids, answer_positions)
    _check_needle(spans, input_ids.shape[1], answer_positions)
    answer_positions, contrast = _in_order(answer_positions, contrast)
    rows = [position - 1 for position in answer_positions]
    fed = input_ids[:, : max(rows) + 1]  # a causal model's answer rows do not depend on anything later
    answer_ids = input_ids[0, list(answer_positions)]
    target = Target.of(answer_ids, contrast)
    follow = trace if norm == "frozen" else trace_projections
    meter = Meter(model)
    with (
        torch.inference_mode(),
        record(model, rows, spans, backend=backend, verify=verify, watch=meter.scoring) as recording,
        follow(model, rows, meter.scoring) as stream,
        token_chunks(model, token_chunk),
    ):
        logits = answer_logits(model, fed, rows)
    with torch.inference_mode(), exact(), meter.scoring.running(input_ids.device):
        directions, completeness = _directions(model, norm, stream, recording, target, logits)
        arrays = _score_layers(model, recording, directions, input_ids, spans, answer_ids)
    meta = {
        "needle_visible_share": _visible_shares(recording, spans),
        **describe_model(model),
        "norm": norm,
        "contrast": contrast if contrast is None or isinstance(contrast, str) else list(contrast),
        "needle_spans": [list(span) for span in spans],
        "answer_positions": list(map(int, answer_positions)),
        "answer_ids": answer_ids.tolist(),
        "predicted_ids": logits.argmax(-1).tolist(),
        "tokens": int(input_ids.shape[1]),
        "cost": meter.cost().as_dict(),
    } | completeness
    return HeadScores(**arrays, meta=meta)


class LocosScorer:
    """Scores trials on one model: `LocosScorer(model, tokenizer).score(trial)`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, norm: str = "none", backend: str = "auto"
    ) -> None:
        self.model, self.tokenizer, self.norm, self.backend = model, tokenizer, norm, backend

    def score(self, trial: Trial) -> HeadScores:
        """`score_tokens` of the trial's prompt and answer; `meta` says how the answer was tokenised."""
        device = self.model.get_input_embeddings().weight.device
        scores = score_tokens(
            self.model,
            trial.input_ids.to(device),
            trial.needle_span,
            trial.answer_positions,
            norm=self.norm,
            backend=self.backend,
        )
        scores.meta["trial"] = trial.id
        scores.meta["answer_tokens"] = [self.tokenizer.decode([token]) for token in trial.answer_ids]
        return scores


def _in_order(
    positions: Sequence[int], contrast: str | Sequence[int] | None
) -> tuple[list[int], str | list[int] | None]:
    """Answer positions in increasing order, and the contrast tokens with them."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    if contrast is not None and not isinstance(contrast, str) and len(contrast) == len(positions):
        contrast = [int(contrast[i]) for i in order]
    return [int(positions[i]) for i in order], contrast if contrast is None or isinstance(contrast, str) else list(
        contrast
    )


def check_norm(norm: str) -> None:
    """Raises ValueError if this is no norm mode."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Model, dtype, attention implementation and library versions, for the `meta` of scores."""
    parameter = next(model.parameters())
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "attn_implementation": model.config.get_text_config(decoder=True)._attn_implementation,
        "versions": {
            "locos_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def completeness_of(attribution: Attribution) -> dict[str, Any]:
    """How far the contributions are from adding up, of the whole model and of each layer, for `meta`.

    Relative to the sum of absolute components; None instead of what is not finite, which JSON does not have.
    """
    layers = {str(number): finite(layer.residual) for number, layer in sorted(attribution.layers.items())}
    return {"overall": finite(attribution.residual), "layers": layers}


def finite(x: float | None) -> float | None:
    """None for nan and infinity."""
    return x if x is not None and math.isfinite(x) else None


class RowScores(NamedTuple):
    """Per answer row and head, (T, H)."""

    l_plus: Tensor
    l_minus: Tensor
    dla: Tensor
    attention_spatial: Tensor
    wu: Tensor
    sees_needle: Tensor  # (T,) bool


def _directions(
    model: PreTrainedModel,
    norm: str,
    stream: StreamTrace,
    recording: Recording,
    target: Target,
    logits: Tensor,
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """w (T, H, Dv) of every attention layer, and what to say of their exactness in `meta`."""
    if norm == "frozen":
        attribution = attribute_heads(model, stream, recording, target, logits)
        meta = {"completeness": completeness_of(attribution), "final_logit_softcap": attribution.softcap}
        return {number: layer.directions for number, layer in attribution.layers.items()}, meta
    direction = token_directions(model, target)
    directions = {}
    for number, kept in recording.items():
        projected = stream.projected[number]
        directions[number], _ = head_directions(projected.module, direction, kept.output[0], projected.inputs)
    return directions, {}


def _score_layers(
    model: PreTrainedModel,
    recording: Recording,
    directions: dict[int, Tensor],
    input_ids: Tensor,
    spans: list[Span],
    answer_ids: Tensor,
) -> dict[str, np.ndarray]:
    heads = max(kept.output.shape[2] for kept in recording.values())
    arrays = {name: np.full((layer_count(model), heads), np.nan) for name in ARRAYS}
    for number, kept in recording.items():
        values = _mean_over_rows(_row_scores(kept, directions[number], input_ids[0], spans, answer_ids))
        for name, value in values.items():
            arrays[name][number, : kept.output.shape[2]] = value.double().cpu().numpy()
    return arrays


def _visible_shares(recording: Recording, spans: list[Span]) -> dict[str, float]:
    """Layer -> share of the needle's tokens that an answer row of the layer sees, mean over the rows, 0 to 1."""
    needle = sum(end - start for start, end in spans)
    return {
        str(number): float(kept.span_visible[0].sum(-1).double().mean()) / needle for number, kept in recording.items()
    }


def _row_scores(kept: LayerRecord, w: Tensor, ids: Tensor, spans: list[Span], answer_ids: Tensor) -> RowScores:
    w = w.to(kept.output.device)  # (T, H, Dv)
    dla = (kept.output[0].to(w.dtype) * w).sum(-1)  # (T, H)
    l_plus = torch.einsum("htsd,thd->th", kept.span_output[0].to(w.dtype), w)
    mass, total_mass = kept.mass[0].sum(-1).mT, kept.total_mass[0].mT  # (T, H)
    needle, visible = kept.span_visible[0].sum(-1), kept.visible[0]  # (T,)
    others = visible - needle
    scale = torch.where(others > 0, needle / others.clamp(min=1), 0.0).to(w.dtype)[:, None]
    slot = kept.argmax[0].mT  # (T, H)
    in_needle = torch.stack([(slot >= start) & (slot < end) for start, end in spans]).any(0)
    ids, answer_ids = ids.to(slot.device), answer_ids.to(slot.device)
    copies = in_needle & (ids[slot.clamp(min=0)] == answer_ids[:, None])
    return RowScores(
        l_plus=l_plus,
        l_minus=scale * (dla - l_plus),
        dla=dla,
        attention_spatial=mass - scale * (total_mass - mass),
        wu=copies / sum(end - start for start, end in spans),
        sees_needle=needle > 0,
    )


def _mean_over_rows(rows: RowScores) -> dict[str, Tensor]:
    seeing = rows.sees_needle
    nothing = torch.full_like(rows.dla[0], torch.nan)

    def mean(x: Tensor) -> Tensor:
        return x[seeing].mean(0) if bool(seeing.any()) else nothing

    l_plus, l_minus = mean(rows.l_plus), mean(rows.l_minus)
    return {
        "score": l_plus - l_minus,
        "l_plus": l_plus,
        "l_minus": l_minus,
        "dla": rows.dla.mean(0),
        "attention_spatial": mean(rows.attention_spatial),
        "wu": rows.wu.sum(0),
    }


def _union(needle_span: Span | Sequence[Span]) -> list[Span]:
    """Disjoint spans, sorted, that cover what the given ones cover."""
    spans: Any = [needle_span] if _is_pair(needle_span) else needle_span
    if not isinstance(spans, Sequence) or not spans or not all(_is_pair(span) for span in spans):
        raise ValueError(f"needle_span: expected (start, end) or several of them, got {needle_span!r}")
    merged: list[Span] = []
    for start, end in sorted((int(start), int(end)) for start, end in spans):
        if not 0 <= start < end:
            raise ValueError(f"needle_span: expected 0 <= start < end, got ({start}, {end})")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _is_pair(span: Any) -> bool:
    return isinstance(span, Sequence) and len(span) == 2 and all(hasattr(x, "__index__") for x in span)


def _check_needle(spans: list[Span], tokens: int, answer_positions: Sequence[int]) -> None:
    for start, end in spans:
        if end > tokens:
            raise ValueError(f"needle_span: expected a span inside the {tokens} tokens, got ({start}, {end})")
        if any(start <= position < end for position in answer_positions):
            raise ValueError(f"needle_span: expected a span clear of the answer, got ({start}, {end})")
        if start > max(answer_positions):
            raise ValueError(f"needle_span: expected a span before the last answer token, got ({start}, {end})")
