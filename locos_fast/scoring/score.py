"""Scoring: one teacher-forced forward pass, one recording, every detector (see `detectors` for the formulas)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits, check_prompt
from locos_fast.models.architecture import layer_count
from locos_fast.models.cost import Meter
from locos_fast.models.description import describe_model
from locos_fast.models.head_map import check_head_map
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.residual_stream import trace, trace_projections
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.ops.backends import BackendName
from locos_fast.ops.exact import exact
from locos_fast.scoring.detectors import Detector, LayerEvidence, detectors_for
from locos_fast.scoring.directions import Norm, Target, check_norm
from locos_fast.scoring.finite import check_layer
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.needle import Span, check_needle, union, visible_shares
from locos_fast.scoring.prompt_parts import PromptParts, Rows
from locos_fast.scoring.recording import Recording, record
from locos_fast.scoring.targets import Directions, Observed, directions_toward
from locos_fast.scoring.token_ids import check_foil_ids, check_token_ids, contrast_ids
from locos_fast.scoring.tuned_lens import TunedLens


def score_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    needle_span: Span | Sequence[Span],
    answer_positions: Sequence[int],
    *,
    norm: Norm = "none",
    contrast: str | Sequence[int] | None = None,
    backend: BackendName = "auto",
    verify: bool = False,
    token_chunk: int | None = TOKENS_PER_CHUNK,
    prefix: PrefixCache | None = None,
    parts: PromptParts | None = None,
    lens: TunedLens | None = None,
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
    prefix: keys and values of the first tokens of `input_ids`, computed before, which are not computed again; it is put
    back. A cached and a whole prompt give the same scores up to rounding.
    parts: where the prompt ends, its question, a foil; with them `others` holds every further detector of
    `detectors.DETECTORS` that they allow, from the same pass, LOCOS in true logit units among them. Where those cannot
    be had, `meta["frozen_unavailable"]` says why. lens: with `parts`, also score through a tuned lens.

    Scores are means over the answer rows that see at least one needle key (DLA: over all rows; Wu: a sum); a layer in
    which no row does is NaN in score, l_plus, l_minus and attention_spatial. A needle partly inside a layer's window
    counts with the part that is seen; `meta["needle_visible_share"]` keeps how much that was. `meta["cost"]` keeps the
    seconds of the forward pass and of scoring, and the peak memory above what was in use before, in bytes.
    Raises ValueError for arguments that do not fit and UnsupportedModelError for models that cannot be recorded.
    """
    check_norm(norm)
    if lens is not None and (parts is None or norm != "none"):
        raise ValueError('lens: needs parts and norm="none"')
    spans = union(needle_span)
    positions = check_prompt(input_ids, answer_positions)
    check_needle(spans, input_ids.shape[1], positions)
    check_token_ids(model, input_ids, positions)
    answer_positions, contrast = _in_order(positions, contrast_ids(model, contrast, len(positions)))
    rows = Rows.of(answer_positions, parts)
    answer_rows = [position - 1 for position in answer_positions]
    fed = input_ids[:, : max(answer_rows) + 1]  # a causal model's answer rows do not depend on anything later
    if prefix is not None:
        prefix.check_continued_by(fed, rows.recorded)
    targets = {"answer": Target.of(input_ids[0, answer_positions], contrast)}
    if parts is not None and parts.foil_ids:
        check_foil_ids(model, parts.foil_ids)
        targets["foil"] = targets["answer"].instead(parts.foil_ids)
    frozen_too = parts is not None and norm == "none"
    follow = trace if norm == "frozen" or frozen_too else trace_projections
    check_head_map(model, fed)  # the first time it runs the model, whose mapped weights are then in memory
    meter = Meter(model)
    with (
        torch.inference_mode(),
        record(model, rows.recorded, spans, backend=backend, verify=verify, watch=meter.scoring) as recording,
        follow(model, answer_rows, meter.scoring) as stream,
        token_chunks(model, token_chunk),
    ):
        logits = answer_logits(model, fed, answer_rows, prefix)
    with torch.inference_mode(), exact(), meter.scoring.running(input_ids.device):
        recorded = recording.at(rows.answer)
        observed = Observed(model, stream, recorded, logits)
        directions = directions_toward(observed, targets, norm, frozen_too=frozen_too, lens=lens)
        detectors = detectors_for(_what_is_there(parts, directions))
        arrays = _score_layers(model, recording, rows, directions, input_ids[0], spans, answer_positions, detectors)
    meta = {
        "needle_visible_share": visible_shares(recorded, spans),
        **describe_model(model),
        "norm": norm,
        "contrast": contrast,
        "needle_spans": [list(span) for span in spans],
        "answer_positions": answer_positions,
        "answer_ids": input_ids[0, answer_positions].tolist(),
        "predicted_ids": logits.argmax(-1).tolist(),
        "tokens": int(input_ids.shape[1]),
        "prefix_tokens": 0 if prefix is None else prefix.tokens,
        "cost": meter.cost().as_dict(),
    } | directions.meta
    return HeadScores.of(arrays, meta=meta)


def _in_order(positions: list[int], contrast: str | list[int] | None) -> tuple[list[int], str | list[int] | None]:
    """Answer positions in increasing order, and the contrast tokens with them."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    return [positions[i] for i in order], [contrast[i] for i in order] if isinstance(contrast, list) else contrast


def _score_layers(
    model: PreTrainedModel,
    recording: Recording,
    rows: Rows,
    directions: Directions,
    ids: Tensor,
    spans: list[Span],
    answer_positions: list[int],
    detectors: Sequence[Detector],
) -> dict[str, np.ndarray]:
    heads = max(kept.output.shape[2] for kept in recording.values())
    arrays = {detector.name: np.full((layer_count(model), heads), np.nan) for detector in detectors}
    for number, kept in recording.items():
        toward, offsets = directions.of_layer(number, rows)
        evidence = LayerEvidence(kept, rows, toward, ids, spans, ids[answer_positions], offsets)
        for detector in detectors:
            value = detector.compute(evidence)
            arrays[detector.name][number, : kept.output.shape[2]] = value.double().cpu().numpy()
        check_layer(number, arrays["dla"][number, : kept.output.shape[2]])  # the others may be NaN by right
    return arrays


def _what_is_there(parts: PromptParts | None, directions: Directions) -> set[str]:
    """The needs of detectors that are met."""
    if parts is None:
        return set()
    targets = {"foil": "foil", "answer-frozen": "frozen", "answer-lens": "lens"}
    has = {"prompt"} | {need for target, need in targets.items() if target in directions.toward}
    return has | ({"question"} if parts.question is not None else set())
