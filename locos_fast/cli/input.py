"""What commands are given, a text file and a model, with one clear line for everything that can be wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locos_fast.models.cache_memory import Way
    from locos_fast.models.memory_estimate import Segments, WithCache
    from locos_fast.prompts.prefix_tree import PrefixNode
    from locos_fast.prompts.trials import Trial


def read_text(path: Path, argument: str, *, newline: str | None = None) -> str:
    r"""The text of a UTF-8 file; newlines become "\n" unless `newline` is "". Raises ValueError naming `argument`."""
    if not path.exists() or path.is_dir():  # a pipe will do: /dev/stdin, <(command)
        raise ValueError(f"{argument}: no file {str(path)!r}")
    try:
        with path.open(encoding="utf-8", newline=newline) as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def load_model(
    source: Any, tokens: int, argument: str, summed: Segments | None = None, *, reply_tokens: int = 0
) -> tuple[Any, int]:
    """The model, and the bytes that a forward over `tokens` tokens needs; refused if the machine lacks them.

    `argument` is where the tokens come from, for the error message; `summed` what an attribution sums; `reply_tokens`
    how many of the tokens the model generates: if any, the keys and values of all tokens are kept.
    """
    from transformers.utils.logging import disable_progress_bar

    from locos_fast.models.cache_memory import Way
    from locos_fast.models.memory_estimate import estimate, refuse_if_too_large

    if not sys.stderr.isatty():
        disable_progress_bar()  # in a log it is noise around the one line that matters
    config = source.config()
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ValueError(f"{argument}: a prompt of {tokens} tokens is longer than the model's {positions} positions")
    dtype, attention, generating = source.torch_dtype(config), source.attn_implementation, reply_tokens > 0
    if source.device_map is None:  # with one, accelerate places what does not fit elsewhere
        device = source.torch_device()
        needed = refuse_if_too_large(config, tokens, dtype, attention, device, summed, generating=generating)
    else:
        needed = estimate(config, tokens, dtype, attention, summed, [Way((tokens,))] if generating else [])
    return source.load(), needed.total


def beginnings_fit(source: Any, trials: Sequence[Trial], reply_tokens: int = 0) -> WithCache | None:
    """Whether the caches of what the trials' prompts share fit as well; to be asked before the model is loaded.

    reply_tokens: the most that the model generates behind each prompt, which its cache then keeps as well.
    None where several devices share the model, whose free memory says nothing of one cache.
    """
    from locos_fast.models.memory_estimate import fits_with_cache

    if source.device_map is not None:
        return None
    config = source.config()
    return fits_with_cache(
        config,
        max(len(trial.prompt_ids) + max(len(trial.answer_ids), reply_tokens) for trial in trials),
        source.torch_dtype(config),
        source.attn_implementation,
        source.torch_device(),
        _ways(trials, reply_tokens),
    )


def _ways(trials: Sequence[Trial], reply_tokens: int) -> Iterator[Way]:
    """How a scan's cache comes to hold each trial; a reply is generated alone, if need be behind a prompt that shares
    nothing, and given answers are run side by side."""
    from locos_fast.models.cache_memory import Way
    from locos_fast.prompts.prefix_tree import passes
    from locos_fast.scoring.shared_prefixes import TOGETHER_BYTES, trial_tree

    sequences = [[*trial.prompt_ids, *trial.answer_ids] for trial in trials]
    tree = trial_tree(trials, "all")  # as `scans.run` has it
    rows = _side_by_side(tree, list(map(len, sequences)))
    for number, ends, together in zip(tree.sequences(), passes(sequences, tree), rows, strict=True):
        if reply_tokens:
            longest = len(trials[number].prompt_ids) + max(len(trials[number].answer_ids), reply_tokens)
            yield Way((*ends[:-1], longest))
        else:
            yield Way(tuple(ends), together, TOGETHER_BYTES)


def _side_by_side(node: PrefixNode, lengths: Sequence[int]) -> Iterator[int]:
    """Of each trial below a node, in the tree's order, how many run in its pass, as `behind_shared_prefixes` has it."""
    from locos_fast.scoring.shared_prefixes import MOST_TOGETHER, SHORT

    short = [lengths[leaf] - node.end <= SHORT for leaf in node.leaves]
    yield from (min(sum(short), MOST_TOGETHER) if little else 1 for little in short)
    for child in node.children:
        yield from _side_by_side(child, lengths)


def check_vocabulary(network: Any, ids: Iterable[int]) -> None:
    """Raises ValueError if the tokenizer gave an id that the model has no row for."""
    tables = (network.get_input_embeddings(), network.get_output_embeddings())
    rows = min(len(table.weight) for table in tables if table is not None)
    if (largest := max(ids)) >= rows:
        raise ValueError(
            f"model: the tokenizer gives token id {largest}, the model's vocabulary has {rows}; it is another model's"
        )


def own_answer(tokenizer: Any, predicted: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
    """For `meta`: what the model itself would have written in place of each answer token, those before it given."""
    return {
        "predicted_ids": list(predicted),
        "predicted_tokens": [tokenizer.decode([token]) for token in predicted],
        "answer_is_predicted": list(predicted) == list(answer),
    }


def own_answer_note(meta: Mapping[str, Any]) -> str | None:
    """One line for people, None where the model would have answered the same."""
    if meta["answer_is_predicted"]:
        return None
    step = next(
        i for i, ids in enumerate(zip(meta["predicted_ids"], meta["answer_ids"], strict=True)) if len({*ids}) > 1
    )
    after = f", after {''.join(meta['answer_tokens'][:step])!r}" if step else ""
    other, given = meta["predicted_tokens"][step], meta["answer_tokens"][step]
    return (
        f"note: the model itself would not have answered this: it would write {other!r} instead of {given!r}{after}; "
        "heads are scored toward it all the same"
    )
