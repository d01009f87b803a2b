"""Walk over many prompts so that what several of them begin with is computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import token_chunks
from locos_fast.prompts.prefix_tree import PrefixNode, prefix_tree
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.prompt_parts import Detectors, first_row


def trial_tree(trials: Sequence[Trial], detectors: Detectors = "published") -> PrefixNode:
    """What the trials' prompts have in common; the rows that the detectors read are never shared."""
    return prefix_tree(
        [[*trial.prompt_ids, *trial.answer_ids] for trial in trials], [first_row(trial, detectors) for trial in trials]
    )


def behind_shared_prefixes(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    tree: PrefixNode,
    *,
    token_chunk: int | None,
    skip: Container[int] = (),
) -> Iterator[tuple[int, PrefixCache | None]]:
    """Yield every trial's number, in the tree's order, with the keys and values of its shared beginning.

    The prefix may be continued until the next trial is asked for, if it is put back (`PrefixCache.branch`); None where
    nothing is shared or the model takes no cache. Trials in `skip` are left out, and so is what only they need; what
    the others are given does not depend on it, to the bit.
    """
    try:
        prefix = PrefixCache(model)
    except UnsupportedModelError:
        prefix = None
    yield from _walk(model, trials, tree, prefix, token_chunk, skip)


def _walk(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    node: PrefixNode,
    prefix: PrefixCache | None,
    token_chunk: int | None,
    skip: Container[int],
) -> Iterator[tuple[int, PrefixCache | None]]:
    wanted = [i for i in node.sequences() if i not in skip]
    if not wanted:
        return
    if prefix is not None and node.end > prefix.tokens:
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([trials[wanted[0]].prompt_ids[prefix.tokens : node.end]], device=device)
        with token_chunks(model, token_chunk):
            prefix.extend(ids)
    for leaf in node.leaves:
        if leaf not in skip:
            yield leaf, prefix if node.end else None
    for child in node.children:
        with contextlib.nullcontext() if prefix is None else prefix.branch():
            yield from _walk(model, trials, child, prefix, token_chunk, skip)
