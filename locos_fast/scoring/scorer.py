"""LocosScorer: a model and its tokenizer, ready to score trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK
from locos_fast.ops.backends import BackendName
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.directions import Norm
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.prompt_parts import Detectors, PromptParts
from locos_fast.scoring.score import score_tokens
from locos_fast.scoring.shared_prefixes import behind_shared_prefixes, trial_tree


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
        detectors: Detectors = "published",
    ) -> HeadScores:
        """`score_tokens` of the trial's prompt and answer, whose other arguments and errors these are.

        norm and backend are those of the scorer where they are None. `meta` says what was asked and how the
        answer was tokenised. detectors: "published", the six arrays that are attributes of `HeadScores`, or "all",
        which reads the rows of the question and of the prompt's end, too, for what `HeadScores.others` then holds.
        """
        return self._score(trial, None, norm, contrast, backend, verify, token_chunk, detectors)

    def score_many(
        self,
        trials: Sequence[Trial],
        *,
        norm: Norm | None = None,
        contrast: Literal["mean"] | None = None,
        backend: BackendName | None = None,
        verify: bool = False,
        token_chunk: int | None = TOKENS_PER_CHUNK,
        detectors: Detectors = "published",
        done: Callable[[int, HeadScores], None] | None = None,
    ) -> list[HeadScores]:
        """`score` of each trial, in the order given; what several prompts begin with is computed once.

        A shared beginning is kept as a KV cache, from which each trial continues and which is then put back: exact for
        causal models, up to rounding. It takes the memory of that cache on top of a single trial's. `meta` says how
        many tokens were shared (`prefix_tokens`), 0 where the model takes no cache or its keys depend on the length
        of the prompt.
        done: called with a trial's place in `trials` and its scores as soon as they are there.
        """
        results: dict[int, HeadScores] = {}
        tree = trial_tree(trials, detectors) if trials else None
        walk = () if tree is None else behind_shared_prefixes(self.model, trials, tree, token_chunk=token_chunk)
        for number, prefix in walk:
            results[number] = self._score(
                trials[number], prefix, norm, contrast, backend, verify, token_chunk, detectors
            )
            if done is not None:
                done(number, results[number])
        return [results[i] for i in range(len(trials))]

    def _ids(self, trial: Trial) -> Tensor:
        return trial.input_ids.to(self.model.get_input_embeddings().weight.device)

    def _score(
        self,
        trial: Trial,
        prefix: PrefixCache | None,
        norm: Norm | None,
        contrast: str | Sequence[int] | None,
        backend: BackendName | None,
        verify: bool,
        token_chunk: int | None,
        detectors: Detectors,
    ) -> HeadScores:
        scores = score_tokens(
            self.model,
            self._ids(trial),
            trial.needle_span,
            trial.answer_positions,
            norm=norm or self.norm,
            contrast=contrast,
            backend=backend or self.backend,
            verify=verify,
            token_chunk=token_chunk,
            prefix=prefix,
            parts=PromptParts.of(trial) if detectors == "all" else None,
        )
        scores.meta |= trial.describe()
        scores.meta["answer_tokens"] = [self.tokenizer.decode([token]) for token in trial.answer_ids]
        return scores
