"""Scoring: one teacher-forced forward pass, one recording, every detector (see `detectors` for the formulas)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.answer_pass import answer_logits, continued_logits
from locos_fast.models.architecture import layer_count
from locos_fast.models.cost import Meter
from locos_fast.models.description import describe_model
from locos_fast.models.head_map import check_head_map
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.residual_stream import trace, trace_projections
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.ops.backends import BackendName
from locos_fast.ops.exact import exact
from locos_fast.scoring.checked_prompt import Prompt
from locos_fast.scoring.detectors import LayerEvidence, detectors_for
from locos_fast.scoring.directions import Norm, Target, check_norm
from locos_fast.scoring.finite import check_layer
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.needle import Span, visible_shares
from locos_fast.scoring.prompt_parts import PromptParts
from locos_fast.scoring.recording import Recording, record
from locos_fast.scoring.targets import Directions, Observed, directions_toward
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
    prompt = Prompt.checked(model, input_ids, needle_span, answer_positions, contrast=contrast, parts=parts)
    options: dict[str, Any] = {"norm": norm, "backend": backend, "verify": verify, "token_chunk": token_chunk}
    return score_prompts(model, [prompt], prefix, lens=lens, **options)[0]


def score_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    prefix: PrefixCache | None = None,
    *,
    norm: Norm = "none",
    backend: BackendName = "auto",
    verify: bool = False,
    token_chunk: int | None = TOKENS_PER_CHUNK,
    lens: TunedLens | None = None,
) -> list[HeadScores]:
    """`score_tokens` of one prompt, or of several that continue from one prefix: in one forward pass, a batch row each.

    What follows the prefix is filled up to the same length, which under a causal mask nothing in front of it sees. The
    scores are those of each prompt alone up to rounding; `meta["cost"]` shares the pass out evenly, and
    `meta["completeness"]` is that of all rows. The pass holds the cache once for each prompt.
    Raises ValueError for no prompts, and for several without a prefix whose cache serves several
    (`PrefixCache.serves_several`), or with needles in a different number of places.
    """
    several = len(prompts) > 1
    if several and (prefix is None or not prefix.serves_several or len({len(prompt.spans) for prompt in prompts}) > 1):
        raise ValueError("prompts: expected a prefix whose cache serves several, and needles in as many places each")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    if prefix is not None:
        for prompt in prompts:
            prefix.check_continued_by(prompt.fed, prompt.rows.recorded)
    check_norm(norm)
    with_parts = [prompt.parts is not None for prompt in prompts]
    if lens is not None and (norm != "none" or not all(with_parts)):
        raise ValueError('lens: needs parts and norm="none"')
    frozen_too = norm == "none" and all(with_parts)
    check_head_map(model, prompts[0].fed)  # the first time it runs the model, whose mapped weights are then in memory
    meter = Meter(model)
    passed = _Pass.over(list(prompts), prefix)
    follow = trace if norm == "frozen" or frozen_too else trace_projections
    with (
        torch.inference_mode(),
        record(model, passed.rows, passed.spans, backend=backend, verify=verify, watch=meter.scoring) as recording,
        follow(model, passed.traced, meter.scoring) as stream,
        token_chunks(model, token_chunk),
    ):
        logits = passed.logits(model)
    with torch.inference_mode(), exact(), meter.scoring.running(prompts[0].input_ids.device):
        each = [recording.of(number, len(prompt.rows.recorded)) for number, prompt in enumerate(prompts)]
        answers = [part.at(prompt.rows.answer) for part, prompt in zip(each, prompts, strict=True)]
        observed = Observed(model, stream, Recording.joined(answers), torch.cat(logits))
        directions = directions_toward(observed, _joined_targets(prompts), norm, frozen_too=frozen_too, lens=lens)
        arrays = [
            _score_layers(model, part, prompt, directions.of_rows(rows))
            for part, prompt, rows in zip(each, prompts, passed.answer_slices(), strict=True)
        ]
    cost = meter.cost().shared_by(len(prompts)).as_dict()
    common = {**describe_model(model), "norm": norm, "prefix_tokens": 0 if prefix is None else prefix.tokens}
    return [
        HeadScores.of(found, meta=_meta(prompt, part, own) | common | {"cost": cost} | directions.meta)
        for found, prompt, part, own in zip(arrays, prompts, answers, logits, strict=True)
    ]


class _Pass(NamedTuple):
    """One forward pass over one prompt, or over what follows the prefix of several."""

    prompts: list[Prompt]
    prefix: PrefixCache | None
    rows: Tensor  # (B, R) slots that are recorded; of a prompt with fewer, the last one again
    spans: Any  # as `record` takes them
    traced: list[int]  # answer rows, one prompt after the other; of several, places in (B * n) tokens

    @classmethod
    def over(cls, prompts: list[Prompt], prefix: PrefixCache | None) -> _Pass:
        most = max(len(prompt.rows.recorded) for prompt in prompts)
        filled = [p.rows.recorded + p.rows.recorded[-1:] * (most - len(p.rows.recorded)) for p in prompts]
        if len(prompts) == 1:
            return cls(prompts, prefix, torch.tensor(filled), prompts[0].spans, prompts[0].answer_rows)
        assert prefix is not None
        length = max(prompt.fed.shape[1] for prompt in prompts) - prefix.tokens
        traced = [n * length + row - prefix.tokens for n, prompt in enumerate(prompts) for row in prompt.answer_rows]
        return cls(prompts, prefix, torch.tensor(filled), torch.tensor([prompt.spans for prompt in prompts]), traced)

    def logits(self, model: PreTrainedModel) -> list[Tensor]:
        """(T, V) of each prompt's answer rows."""
        if len(self.prompts) == 1:
            return [answer_logits(model, self.prompts[0].fed, self.prompts[0].answer_rows, self.prefix)]
        assert self.prefix is not None
        rests = [prompt.fed[:, self.prefix.tokens :] for prompt in self.prompts]
        rows = [[row - self.prefix.tokens for row in prompt.answer_rows] for prompt in self.prompts]
        return continued_logits(model, rests, rows, self.prefix)

    def answer_slices(self) -> Iterator[slice]:
        """Of each prompt's answer rows among those of all."""
        ends = accumulate((len(prompt.answer_rows) for prompt in self.prompts), initial=0)
        return (slice(start, end) for start, end in pairwise(ends))


def _joined_targets(prompts: Sequence[Prompt]) -> dict[str, Target]:
    """Of all answer rows; a prompt without foil stands in for itself, and its detectors know."""
    each = [prompt.targets() for prompt in prompts]
    names = dict.fromkeys(name for targets in each for name in targets)
    return {name: Target.joined([targets.get(name, targets["answer"]) for targets in each]) for name in names}


def _score_layers(
    model: PreTrainedModel, recording: Recording, prompt: Prompt, directions: Directions
) -> dict[str, np.ndarray]:
    detectors = detectors_for(prompt.has() | directions.has(with_parts=prompt.parts is not None))
    heads = max(kept.output.shape[2] for kept in recording.values())
    arrays = {detector.name: np.full((layer_count(model), heads), np.nan) for detector in detectors}
    for number, kept in recording.items():
        toward, offsets = directions.of_layer(number, prompt.rows)
        evidence = LayerEvidence(
            kept, prompt.rows, toward, prompt.input_ids[0], prompt.spans, prompt.answer_ids, offsets
        )
        for detector in detectors:
            value = detector.compute(evidence)
            arrays[detector.name][number, : kept.output.shape[2]] = value.double().cpu().numpy()
        check_layer(number, arrays["dla"][number, : kept.output.shape[2]])  # the others may be NaN by right
    return arrays


def _meta(prompt: Prompt, recorded: Recording, logits: Tensor) -> dict[str, Any]:
    return {
        "needle_visible_share": visible_shares(recorded, prompt.spans),
        "contrast": prompt.contrast,
        "needle_spans": [list(span) for span in prompt.spans],
        "answer_positions": prompt.answer_positions,
        "answer_ids": prompt.answer_ids.tolist(),
        "predicted_ids": logits.argmax(-1).tolist(),
        "tokens": int(prompt.input_ids.shape[1]),
    }
