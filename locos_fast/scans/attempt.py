"""One trial of a scan, tried: how it ended, what is to be said of it, and its scores if it counts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.causal.activation_patching import Metric, cri
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.attention_registry import RecordingError
from locos_fast.models.foreign_errors import is_out_of_memory
from locos_fast.models.generation import StopRules, generate_greedily
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.prompts.trials import Trial
from locos_fast.scans.store import Arrays, Status
from locos_fast.scoring.answer_steps import find_answer_steps
from locos_fast.scoring.checked_prompt import Prompt
from locos_fast.scoring.detectors import CRI
from locos_fast.scoring.diagnosis import doubt, verdict_of
from locos_fast.scoring.directions import Norm, check_norm
from locos_fast.scoring.head_scores import HeadScores, check_count
from locos_fast.scoring.prompt_parts import PromptParts, first_row
from locos_fast.scoring.rouge_gate import passes, rouge_1_recall
from locos_fast.scoring.score import score_prompts
from locos_fast.scoring.tuned_lens import TunedLens

CRI_METRIC: Metric = "first_token_logit_diff"
Protocol = Literal["teacher", "generate"]

SMALL_TOKEN_CHUNK = 512  # of the second attempt, when memory did not suffice


@dataclasses.dataclass(frozen=True)
class Method:
    """What is done with every trial.

    protocol         "teacher": one forward pass over the prompt and the answer; the gate is that the model's own
                     largest logit is the answer's token at every answer step. "generate": the model answers greedily,
                     and the tokens with which it gives the answer are scored; the gate is ROUGE-1 recall above a half.
    norm             of the six published arrays, see `score_tokens`
    gate             whether trials that do not pass are left out
    max_new_tokens, max_thinking_tokens  of a generated reply
    token_chunk      see `score_tokens`
    lens             also score through it
    cri              also patch every head's output into the prompt without its needle: slow, a forward pass for every
                     few heads
    Raises ValueError for a protocol or norm that there is not.
    """

    protocol: Protocol = "teacher"
    norm: Norm = "none"
    gate: bool = True
    max_new_tokens: int = 50
    max_thinking_tokens: int = 0
    token_chunk: int | None = TOKENS_PER_CHUNK
    lens: TunedLens | None = None
    cri: bool = False

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.protocol not in get_args(Protocol):
            raise ValueError(f"protocol: expected {' or '.join(get_args(Protocol))}, got {self.protocol!r}")
        if check_count("max_new_tokens", self.max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        check_count("max_thinking_tokens", self.max_thinking_tokens)
        if self.lens is not None and self.norm != "none":
            raise ValueError(f"tuned lens: it reads raw unembedding rows, norm none, got norm {self.norm!r}")

    @property
    def reply_tokens(self) -> int:
        """How long a generated reply may become; 0 where none is."""
        return self.max_new_tokens + self.max_thinking_tokens if self.protocol == "generate" else 0

    def as_config(self) -> dict[str, Any]:
        """What scores depend on of it."""
        generating = {"max_new_tokens": self.max_new_tokens, "max_thinking_tokens": self.max_thinking_tokens}
        of_protocol = generating if self.protocol == "generate" else {}
        further = {"tuned_lens_sha256": self.lens.digest} if self.lens is not None else {}
        further |= {CRI: CRI_METRIC} if self.cri else {}
        return {"protocol": self.protocol, "gate": self.gate, "norm": self.norm} | of_protocol | further


TEACHER = Method()


class Outcome(NamedTuple):
    """How one trial ended: its status, what its line says, and its scores if it counts."""

    status: Status
    line: dict[str, Any]
    arrays: Arrays


class Attempts:
    """Tries trials on one model."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, method: Method) -> None:
        self.model, self.tokenizer, self.method = model, tokenizer, method
        if method.lens is not None:
            method.lens.check(model)

    def attempt(self, trials: Sequence[Trial], prefix: PrefixCache | None) -> list[Outcome]:
        """Trials that continue from one beginning: side by side where the answers are given, and each on its own where
        they are not, or where that fails."""
        if len(trials) > 1 and self.method.protocol == "teacher":
            together = self._caught(lambda: self._teacher(trials, prefix, self.method.token_chunk))
            if not isinstance(together, Exception):
                return together
            del together
            free_memory()
        return [self._alone(trial, prefix) for trial in trials]

    def _alone(self, trial: Trial, prefix: PrefixCache | None) -> Outcome:
        """One trial: as it is, and where memory does not suffice once more in a smaller way."""

        def run(prefix: PrefixCache | None, token_chunk: int | None) -> list[Outcome]:
            if self.method.protocol == "teacher":
                return self._teacher([trial], prefix, token_chunk)
            with self._behind_prompt(trial, prefix, token_chunk) as own:
                return [self._generate(trial, own, token_chunk)]

        found = self._caught(lambda: run(prefix, self.method.token_chunk))
        if isinstance(found, Exception) and is_out_of_memory(found):
            del found
            free_memory()
            found = self._caught(lambda: run(None, SMALL_TOKEN_CHUNK))
        if isinstance(found, Exception):
            return _failure("out-of-memory" if is_out_of_memory(found) else "failed", found)
        return found[0]

    def reply(self, trial: Trial) -> str:
        """What the model says to a trial's prompt."""
        stop = StopRules.of(self.model, self.tokenizer)
        said = generate_greedily(self.model, trial.prompt_ids, stop=stop, max_new_tokens=self.method.max_new_tokens)
        return str(self.tokenizer.decode(said.ids))

    def _caught(self, run: Callable[[], list[Outcome]]) -> list[Outcome] | Exception:
        try:
            return run()
        except (UnsupportedModelError, RecordingError):
            raise
        except (ValueError, RuntimeError, ArithmeticError, IndexError, MemoryError) as error:
            return error.with_traceback(None)  # whose frames would hold what did not fit

    def _teacher(self, trials: Sequence[Trial], prefix: PrefixCache | None, token_chunk: int | None) -> list[Outcome]:
        prompts = [
            self._prompt(trial, trial.input_ids, trial.answer_positions, PromptParts.of(trial)) for trial in trials
        ]
        outcomes = []
        for trial, scores in zip(trials, self._score(prompts, prefix, token_chunk), strict=True):
            predicted, answer = scores.meta["predicted_ids"], scores.meta["answer_ids"]
            line = {
                "predicted_ids": predicted,
                "answer_ids": answer,
                "predicted": [self.tokenizer.decode([token]) for token in predicted],
            }
            outcome = _outcome(scores, line, right=predicted == answer, gate=self.method.gate)
            outcomes.append(self._with_cri(trial, outcome, token_chunk))
        return outcomes

    @contextlib.contextmanager
    def _behind_prompt(
        self, trial: Trial, prefix: PrefixCache | None, token_chunk: int | None
    ) -> Iterator[PrefixCache | None]:
        """The prompt up to the first row that is read, computed once for the reply and for its scores; what it was is
        put back. None for a model that takes no cache."""
        try:
            own = PrefixCache(self.model) if prefix is None else prefix
        except UnsupportedModelError:
            yield None
            return
        with own.branch():
            missing = trial.prompt_ids[own.tokens : first_row(trial, "all")]
            if missing:
                device = self.model.get_input_embeddings().weight.device
                with token_chunks(self.model, token_chunk):
                    own.extend(torch.tensor([missing], device=device))
            yield own if own.tokens else None

    def _generate(self, trial: Trial, prefix: PrefixCache | None, token_chunk: int | None) -> Outcome:
        """The reply is scored as if it had been given, behind the same beginning: one more forward pass over what
        follows that, while generating is not observed at all."""
        stop = StopRules.of(self.model, self.tokenizer, max_thinking_tokens=self.method.max_thinking_tokens)
        reply = generate_greedily(
            self.model,
            trial.prompt_ids,
            prefix=prefix,
            stop=stop,
            max_new_tokens=self.method.max_new_tokens,
            token_chunk=token_chunk,
        )
        said = str(self.tokenizer.decode(reply.said_ids))
        steps = find_answer_steps(self.tokenizer, reply.ids, trial.answer, trial.answer_ids, thinking=reply.thinking)
        line = {
            "generated_ids": reply.ids,
            "generated": said,
            "ended_by": reply.reason,
            "rouge_1_recall": rouge_1_recall(trial.answer, said),
            "answer_steps": steps,
        }
        right = passes(trial.answer, said)
        if not steps or (self.method.gate and not right):
            reason = {} if steps or not right else {"reason": "none of its tokens spell the answer"}
            return Outcome("gated", line | {"right": right} | reason, {})
        prompt = len(trial.prompt_ids)
        ids = torch.tensor([[*trial.prompt_ids, *reply.ids[: steps[-1] + 1]]])
        parts = PromptParts.of(trial)
        if [reply.ids[step] for step in steps] != trial.answer_ids:  # the foil's tokens stand in the places of those
            parts = parts._replace(foil_ids=None)
        answered = self._prompt(trial, ids, [prompt + step for step in steps], parts)
        scores = self._score([answered], prefix, token_chunk)[0]
        return self._with_cri(trial, _outcome(scores, line, right=right, gate=self.method.gate), token_chunk)

    def _with_cri(self, trial: Trial, outcome: Outcome, token_chunk: int | None) -> Outcome:
        if not self.method.cri or outcome.status != "scored":
            return outcome
        filler = self.tokenizer(".", add_special_tokens=False)["input_ids"][-1:]
        try:
            if not filler:
                raise ValueError("the tokenizer has no token for a full stop, which would take the needle's place")
            found = cri(self.model, trial, filler_id=filler[0], metric=CRI_METRIC, token_chunk=token_chunk)
        except (ValueError, RuntimeError, MemoryError) as error:  # the other detectors' scores are there
            free_memory()
            return outcome._replace(line=outcome.line | {"cri_failed": _first_line(error)})
        return outcome._replace(arrays={**outcome.arrays, CRI: found.astype(np.float32)})

    def _prompt(self, trial: Trial, ids: Tensor, positions: list[int], parts: PromptParts) -> Prompt:
        ids = ids.to(self.model.get_input_embeddings().weight.device)
        return Prompt.checked(self.model, ids, trial.needle_span, positions, parts=parts)

    def _score(self, prompts: list[Prompt], prefix: PrefixCache | None, token_chunk: int | None) -> list[HeadScores]:
        norm, dtype = self.method.norm, self.model.dtype
        options: dict[str, Any] = {"norm": norm, "token_chunk": token_chunk, "lens": self.method.lens}
        found = []
        for scores in score_prompts(self.model, prompts, prefix, **options):
            if norm == "frozen" and verdict_of(scores.meta["completeness"], dtype) == "wrong":
                raise ValueError(f"completeness: {doubt(scores.meta['completeness'], dtype)}")
            found.append(_without_doubtful(scores, dtype))
        return found


def _without_doubtful(scores: HeadScores, dtype: torch.dtype) -> HeadScores:
    """Without the scores in logits that come along if they do not add up to the model's logit."""
    completeness = scores.meta.get("frozen_completeness")
    if completeness is None or verdict_of(completeness, dtype) != "wrong":
        return scores
    kept = {name: array for name, array in scores.others.items() if "frozen" not in name}
    doubtful = {"frozen_unavailable": doubt(completeness, dtype)}
    return dataclasses.replace(scores, others=kept, meta=scores.meta | doubtful)


def _outcome(scores: HeadScores, line: dict[str, Any], *, right: bool, gate: bool) -> Outcome:
    line |= {"right": right, "prefix_tokens": scores.meta["prefix_tokens"]}
    if reason := scores.meta.get("frozen_unavailable"):
        line["frozen_unavailable"] = reason
    if gate and not right:
        return Outcome("gated", line, {})
    return Outcome("scored", line, {name: scores.array(name).astype(np.float32) for name in scores.names})


def _failure(status: Status, error: Exception) -> Outcome:
    return Outcome(status, {"reason": _first_line(error)}, {})


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
