"""Walk over many prompts so that what several of them begin with is computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import token_chunks
from locos_fast.prompts.prefix_tree import PrefixNode, prefix_tree
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.prompt_parts import Detectors, first_row

MOST_TOGETHER = 8  # continuations in one forward pass
SHORT = 64  # tokens of such a continuation; longer ones gain nothing from company
TOGETHER_BYTES = 2**30  # of the copies of the cache that the pass makes, one for each


def trial_tree(trials: Sequence[Trial], detectors: Detectors = "published") -> PrefixNode:
    """What the trials' prompts have in common; the rows that the detectors read are never shared."""
    return prefix_tree(
        [[*trial.prompt_ids, *trial.answer_ids] for trial in trials], [first_row(trial, detectors) for trial in trials]
    )


class Group(NamedTuple):
    """Trials that continue from the same beginning."""

    trials: list[int]  # numbers; several may be run in one forward pass, a batch row each
    prefix: PrefixCache | None  # keys and values of the beginning; None where nothing is shared or there is no cache


def cannot_share(model: PreTrainedModel) -> str | None:
    """Why a model's prompts cannot share beginnings; None if they can."""
    try:
        PrefixCache(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def behind_shared_prefixes(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    tree: PrefixNode,
    *,
    token_chunk: int | None,
    skip: Container[int] = (),
) -> Iterator[Group]:
    """Yield all trials, in the tree's order, with the keys and values of their shared beginning.

    The prefix may be continued until the next group is asked for, if it is put back (`PrefixCache.branch`). Groups of
    which all are in `skip` are left out, and so is what only they need; what the others are given does not depend on
    it, to the bit: a group is handed over whole or not at all.
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
) -> Iterator[Group]:
    wanted = [i for i in node.sequences() if i not in skip]
    if not wanted:
        return
    if prefix is not None and node.end > prefix.tokens:
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([trials[wanted[0]].prompt_ids[prefix.tokens : node.end]], device=device)
        with token_chunks(model, token_chunk):
            prefix.extend(ids)
    for group in _groups(trials, node, prefix):
        if any(leaf not in skip for leaf in group):
            yield Group(group, prefix if node.end else None)
    for child in node.children:
        with contextlib.nullcontext() if prefix is None else prefix.branch():
            yield from _walk(model, trials, child, prefix, token_chunk, skip)


def _groups(trials: Sequence[Trial], node: PrefixNode, prefix: PrefixCache | None) -> Iterator[list[int]]:
    """The leaves of a node: those that have little left side by side, the others alone."""
    short: list[int] = []
    if prefix is not None and node.end and prefix.serves_several:
        room = min(MOST_TOGETHER, TOGETHER_BYTES // max(prefix.bytes, 1))
        short = [i for i in node.leaves if len(trials[i].prompt_ids) + len(trials[i].answer_ids) - node.end <= SHORT]
        short = short if room > 1 else []
        yield from (short[start : start + room] for start in range(0, len(short), max(room, 1)))
    alone = set(node.leaves) - set(short)
    yield from ([leaf] for leaf in node.leaves if leaf in alone)
