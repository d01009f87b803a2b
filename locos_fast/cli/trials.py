"""The trials that a command runs: what can be wrong with a data set is said before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locos_fast.prompts.scan_trials import ScanTrials


def trials_of(
    dataset: str,
    *,
    lengths: str,
    depths: str | None,
    limit: int,
    needles_per_context: int,
    haystack: str | None,
    chat_template: bool | None,
    prompt_suffix: str,
    question_type: str | None,
    characters: int | None,
    seed: int,
) -> Callable[[Any], ScanTrials]:
    """Reads the data set; what is returned composes its trials for a tokenizer. Raises ValueError for bad input."""
    from locos_fast.planted.trials import planted_trials
    from locos_fast.prompts.datasets import read_dataset
    from locos_fast.prompts.datasets.registry import PLANTED
    from locos_fast.prompts.scan_trials import scan_grid, scan_trials

    scan_grid(lengths, depths, needles_per_context)
    name, _, kind = dataset.partition(":")
    if name == PLANTED:
        for option, value in (
            ("needles-per-context", needles_per_context > 1),
            ("haystack", haystack),
            ("chat-template", chat_template),
            ("prompt-suffix", prompt_suffix),
            ("question-type", question_type),
            ("characters", characters),
        ):
            if value:
                raise ValueError(f"{option}: planted has none")
        return lambda tokenizer: planted_trials(
            tokenizer, kind or None, lengths=lengths, depths=depths, limit=limit, seed=seed
        )
    data = read_dataset(dataset, seed=seed, question_type=question_type, characters=characters)
    return lambda tokenizer: scan_trials(
        tokenizer,
        data,
        lengths=lengths,
        haystack=haystack,
        depths=depths,
        limit=limit,
        needles_per_context=needles_per_context,
        chat_template=chat_template,
        prompt_suffix=prompt_suffix,
        seed=seed,
    )
