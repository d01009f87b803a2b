"""The trials of a scan: a data set over a grid of prompt lengths and depths, and what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from locos_fast.prompts.datasets import Dataset, read_dataset
from locos_fast.prompts.haystacks import read_haystack
from locos_fast.prompts.needle_grid import Grid, needle_trials, packed_trials, unreached, without_repeats
from locos_fast.prompts.needle_prompt import Composer, Haystack
from locos_fast.prompts.trials import Trial

DEPTHS, LIMIT, ESSAYS = 5, 96, "essays"
NO_FOIL = "no trial has a wrong answer to compare with: needles of one kind give each other theirs if they name a group"


class ScanTrials(NamedTuple):
    """Trials, and what they depend on.

    config  for config.json: data set, haystack, grid, seed ... (JSON)
    notes   sentences about what the user might not expect
    """

    trials: list[Trial]
    config: dict[str, Any]
    notes: list[str]


def scan_grid(
    lengths: str | Sequence[int], depths: str | int | Sequence[float] | None, needles_per_context: int = 1
) -> Grid:
    """The grid of a scan; several needles to a context are spread evenly over it.

    Raises ValueError, naming the argument, for what is no grid.
    """
    if needles_per_context < 1:
        raise ValueError(f"needles-per-context: expected at least 1, got {needles_per_context}")
    if needles_per_context > 1:
        if depths is not None:
            raise ValueError("depths: --needles-per-context spreads the needles evenly; give one of the two")
        depths = needles_per_context
    return Grid.of(lengths, DEPTHS if depths is None else depths)


def scan_trials(
    tokenizer: Any,
    dataset: str | Dataset = "numbers",
    *,
    lengths: str | Sequence[int],
    haystack: str | None = None,
    depths: str | int | Sequence[float] | None = None,
    limit: int = LIMIT,
    needles_per_context: int = 1,
    chat_template: bool | None = None,
    prompt_suffix: str = "",
    seed: int = 0,
) -> ScanTrials:
    """At most `limit` trials of a data set, spread evenly over lengths, depths and facts, as token ids of a tokenizer.

    dataset: a name that `read_dataset` knows, or what it returns. lengths: of prompts, in tokens, or "A:B:N", N of them
    from A to B. depths: how many, or percentages of the context; 5 of them. haystack: essays, a text file or a folder,
    for data sets that bring none; essays. needles_per_context: so many are hidden together, evenly spaced, and each is
    asked for. chat_template: whether to ask as a chat, thinking off; if the tokenizer has a template. prompt_suffix:
    text behind the question.
    Raises ValueError, naming the argument, for whatever does not fit: an unknown data set, a haystack that is too short
    or gives answers away, a needle longer than the shortest prompt, a missing chat template.
    """
    data = read_dataset(dataset, seed=seed) if isinstance(dataset, str) else dataset
    grid = scan_grid(lengths, depths, needles_per_context)
    if haystack is not None and data.texts:
        raise ValueError(f"haystack: {data.name} brings its own, got {haystack!r}")
    if limit < 1:
        raise ValueError(f"limit: expected at least 1 trial, got {limit}")
    name = haystack or ESSAYS
    texts = data.texts or {"": read_haystack(name)}
    if chat_template is None:
        chat_template = bool(getattr(tokenizer, "chat_template", None))
    composer = Composer(tokenizer, chat_template=chat_template, prompt_suffix=prompt_suffix)
    tokens = max(grid.lengths)
    used = {fact.haystack for fact in data.facts}
    hays = {key: _tokenised(tokenizer, texts[key], tokens if data.repeated else 0) for key in texts if key in used}
    facts, left_out, notes = data.fit_for({key: hay.beginning(tokens) for key, hay in hays.items()})
    if packed := needles_per_context > 1:
        trials = packed_trials(
            composer, hays, facts, grid.lengths, per_context=needles_per_context, limit=limit, name=data.name
        )
    else:
        trials = needle_trials(composer, hays, facts, grid, limit=limit, name=data.name, seed=seed)
    config = {
        "dataset": data.name,
        "dataset_sha256": _digest(json.dumps(facts)),
        **data.options,
        "left_out": left_out,
        "haystack": data.name if data.texts else name,
        "haystack_sha256": _digest_of_texts(texts),
        "contexts": "packed" if packed else "single",
        "needles_per_context": needles_per_context,
        "lengths": grid.lengths,
        "depths": grid.depths,
        "limit": limit,
        "chat_template": chat_template,
        "prompt_suffix": prompt_suffix,
        "seed": seed,
    }
    distinct, repeats = without_repeats(trials)
    foils = [] if any(trial.foil for trial in distinct) else [NO_FOIL]
    return ScanTrials(distinct, config, [*notes, *repeats, *unreached(distinct, grid), *foils])


def _tokenised(tokenizer: Any, text: str, least: int) -> Haystack:
    """A haystack of at least so many tokens, if need be the text several times, blank lines between."""
    haystack = Haystack.of(tokenizer, text)
    if least <= len(haystack.ids):
        return haystack
    copies = least // max(len(haystack.ids), 1) + 1
    return Haystack.of(tokenizer, "\n\n".join([text.strip()] * copies))


def _digest_of_texts(texts: Mapping[str, str]) -> str:
    return _digest(texts[""] if list(texts) == [""] else json.dumps(dict(texts)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
