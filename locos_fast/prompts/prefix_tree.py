"""What the prompts of many trials have in common, as a tree: each shared run of tokens is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

LEAST_SAVED = 16  # tokens; a shared run that saves fewer is not worth a forward pass of its own
MOST_LEVELS = 256  # of a tree, which is walked by recursion; what shares more than so many beginnings shares those


class PrefixNode(NamedTuple):
    """A run of tokens that begins all sequences below it, and what follows it."""

    end: int  # the sequences below agree on their first `end` tokens, all of which may be reused
    leaves: list[int]  # sequences that continue from here on their own
    children: list[PrefixNode]  # sequences that share more with each other

    def sequences(self) -> Iterator[int]:
        """All sequences below, in the order in which the tree is walked."""
        yield from self.leaves
        for child in self.children:
            yield from child.sequences()


def prefix_tree(sequences: Sequence[Sequence[int]], reusable: Sequence[int]) -> PrefixNode:
    """The tree of common beginnings of `sequences` of token ids.

    reusable: how many tokens of each sequence may come from another one's computation; at most its length. Under a
    causal mask that is everything in front of the first row that is read. The tree has `MOST_LEVELS` levels at most.
    """
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    return _node(order, sequences, reusable, done=0, levels=MOST_LEVELS)


def passes(sequences: Sequence[Sequence[int]], tree: PrefixNode) -> Iterator[list[int]]:
    """For every sequence, tokens that are there after each pass on the way to it, increasing, its own pass last; none
    for one that shares nothing."""
    yield from _passes(sequences, tree, [])


def _passes(sequences: Sequence[Sequence[int]], node: PrefixNode, before: list[int]) -> Iterator[list[int]]:
    ends = [*before, node.end] if node.end > max(before, default=0) else before
    for leaf in node.leaves:
        yield [*ends, len(sequences[leaf])] if ends else []
    for child in node.children:
        yield from _passes(sequences, child, ends)


def _node(
    group: list[int], sequences: Sequence[Sequence[int]], reusable: Sequence[int], *, done: int, levels: int
) -> PrefixNode:
    """The node of a sorted group whose first `done` tokens agree and are there already; levels: with its own."""
    common = _common(group, sequences, reusable)
    end = common if (len(group) - 1) * (common - done) >= LEAST_SAVED else done
    leaves: list[int] = []
    children: list[PrefixNode] = []
    going_on = [i for i in group if reusable[i] > common]
    leaves += [i for i in group if reusable[i] <= common]
    for _, members in groupby(going_on, key=lambda i: sequences[i][common]):
        below = list(members)
        shared = _common(below, sequences, reusable)
        if levels == 1 or (len(below) - 1) * (shared - end) < LEAST_SAVED:
            leaves += below
        else:
            children.append(_node(below, sequences, reusable, done=end, levels=levels - 1))
    return PrefixNode(end, leaves, children)


def _common(group: list[int], sequences: Sequence[Sequence[int]], reusable: Sequence[int]) -> int:
    """Tokens that all of a sorted group begin with: those that its first and its last share."""
    first, last = sequences[group[0]], sequences[group[-1]]
    most = min(len(first), len(last), *(reusable[i] for i in group))
    return next((i for i in range(most) if first[i] != last[i]), most)
