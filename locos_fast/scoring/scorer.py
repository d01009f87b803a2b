"""LocosScorer: a model and its tokenizer, ready to score trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from locos_fast.models.token_chunks import TOKENS_PER_CHUNK
from locos_fast.ops.backends import BackendName
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.directions import Norm
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.score import score_tokens


class Tokenizer(Protocol):
    """What scoring needs of a tokenizer."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


class LocosScorer:
    """Scores trials on one model: `LocosScorer(model, tokenizer).score(trial)`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, norm: Norm = "none", backend: BackendName = "auto"
    ) -> None:
        self.model, self.tokenizer, self.norm, self.backend = model, tokenizer, norm, backend

    def score(
        self,
        trial: Trial,
        *,
        norm: Norm | None = None,
        contrast: str | Sequence[int] | None = None,
        backend: BackendName | None = None,
        verify: bool = False,
        token_chunk: int | None = TOKENS_PER_CHUNK,
    ) -> HeadScores:
        """`score_tokens` of the trial's prompt and answer, whose other arguments and errors these are.

        norm and backend are those of the scorer where they are None. `meta` says how the answer was tokenised.
        """
        device = self.model.get_input_embeddings().weight.device
        scores = score_tokens(
            self.model,
            trial.input_ids.to(device),
            trial.needle_span,
            trial.answer_positions,
            norm=norm or self.norm,
            contrast=contrast,
            backend=backend or self.backend,
            verify=verify,
            token_chunk=token_chunk,
        )
        scores.meta["trial"] = trial.id
        scores.meta["answer_tokens"] = [self.tokenizer.decode([token]) for token in trial.answer_ids]
        return scores
