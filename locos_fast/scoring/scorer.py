"""LocosScorer: a model and its tokenizer, ready to score trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel

from locos_fast.models.token_chunks import TOKENS_PER_CHUNK
from locos_fast.ops.backends import BackendName
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.checked_prompt import Prompt
from locos_fast.scoring.directions import Norm
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.prompt_parts import Detectors, PromptParts
from locos_fast.scoring.score import score_prompts
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
        prompt = self._prompt(trial, contrast, detectors)
        scores = score_prompts(self.model, [prompt], **self._options(norm, backend, verify, token_chunk))
        return self._described(scores[0], trial)

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
        causal models, up to rounding. Trials that have little left share a forward pass. It takes the memory of that
        cache on top of a single trial's, and of its copies in such a pass, at most 1 GiB. `meta` says how
        many tokens were shared (`prefix_tokens`), 0 where the model takes no cache or its keys depend on the length
        of the prompt.
        done: called with a trial's place in `trials` and its scores as soon as they are there.
        """
        results: dict[int, HeadScores] = {}
        tree = trial_tree(trials, detectors) if trials else None
        walk = () if tree is None else behind_shared_prefixes(self.model, trials, tree, token_chunk=token_chunk)
        options = self._options(norm, backend, verify, token_chunk)
        for numbers, prefix in walk:
            prompts = [self._prompt(trials[number], contrast, detectors) for number in numbers]
            for number, scores in zip(numbers, score_prompts(self.model, prompts, prefix, **options), strict=True):
                results[number] = self._described(scores, trials[number])
                if done is not None:
                    done(number, results[number])
        return [results[i] for i in range(len(trials))]

    def _prompt(self, trial: Trial, contrast: str | Sequence[int] | None, detectors: Detectors) -> Prompt:
        return Prompt.checked(
            self.model,
            trial.input_ids.to(self.model.get_input_embeddings().weight.device),
            trial.needle_span,
            trial.answer_positions,
            contrast=contrast,
            parts=PromptParts.of(trial) if detectors == "all" else None,
        )

    def _options(
        self, norm: Norm | None, backend: BackendName | None, verify: bool, token_chunk: int | None
    ) -> dict[str, Any]:
        given = {"norm": norm or self.norm, "backend": backend or self.backend}
        return given | {"verify": verify, "token_chunk": token_chunk}

    def _described(self, scores: HeadScores, trial: Trial) -> HeadScores:
        scores.meta |= trial.describe()
        scores.meta["answer_tokens"] = [self.tokenizer.decode([token]) for token in trial.answer_ids]
        return scores
