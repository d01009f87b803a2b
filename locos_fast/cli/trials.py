"""The trials that a command runs: what can be wrong with a data set is said before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from locos_fast.prompts.scan_trials import ScanTrials

Dataset = Annotated[
    str,
    typer.Option(
        metavar="NAME[:FOLDER]",
        help="numbers (the needle says the answer), bridges (it has to be inferred), niah, nolima, nolima-hard "
        "(see `data get`), planted, or a .jsonl file.",
    ),
]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens: A:B:N, N of them from A to B, or A,B,...")]
Haystack = Annotated[
    str | None,
    typer.Option(help="essays, a UTF-8 text file, or a folder of .txt files; essays, or the data set's own."),
]
Depths = Annotated[
    str | None, typer.Option(help="How many depths from 0 to 100 %, or percentages: 10,50,90 or 50%; 5 of them.")
]
Limit = Annotated[int, typer.Option(min=1, help="Trials at most, spread evenly over lengths and depths.")]
NeedlesPerContext = Annotated[
    int, typer.Option(min=1, help="Hide that many needles, evenly spaced, in one context and ask for each.")
]
ChatTemplate = Annotated[
    bool | None, typer.Option(help="Ask as a chat, thinking off; the default if the tokenizer has a template.")
]
PromptSuffix = Annotated[str, typer.Option(help="Text behind the question.")]
QuestionType = Annotated[str | None, typer.Option(help="Of NoLiMa: onehop, twohop or twohop2; onehop.")]
Characters = Annotated[int | None, typer.Option(min=1, help="Of NoLiMa: how many of each test's; 1.")]


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
