"""The tree of common beginnings: every sequence once, every shared run as long as it may be."""

from hypothesis import given
from hypothesis import strategies as st

from locos_fast.prompts.prefix_tree import LEAST_SAVED, MOST_LEVELS, PrefixNode, passes, prefix_tree

HAYSTACK = list(range(100, 200))


def computed(node: PrefixNode, sequences: list[list[int]], done: int = 0) -> int:
    """Tokens that a walk over the tree computes."""
    own = node.end - done + sum(len(sequences[i]) - node.end for i in node.leaves)
    return own + sum(computed(child, sequences, node.end) for child in node.children)


def test_questions_on_one_context_share_the_context() -> None:
    questions = [[*HAYSTACK, 1, 2, 3], [*HAYSTACK, 4, 5, 6], [*HAYSTACK, 7, 8, 9]]
    tree = prefix_tree(questions, [102] * 3)
    assert tree == PrefixNode(100, [0, 1, 2], [])


def test_a_depth_grid_shares_what_precedes_each_needle() -> None:
    needle = [1, 2, 3]
    grid = [[*HAYSTACK[:depth], *needle, *HAYSTACK[depth:], 9] for depth in (25, 50, 75, 100)]
    tree = prefix_tree(grid, [103] * 4)
    assert tree.end == 25
    assert computed(tree, grid) == 75 + 79 + 54 + 29 + 29  # the haystack up to 75 once, and four rests


def test_rows_that_are_read_are_never_reused() -> None:
    same = [[*HAYSTACK, 1, 2]] * 3
    tree = prefix_tree(same, [101, 60, 101])
    assert tree.end == 60
    assert tree.leaves == [1]
    assert [child.end for child in tree.children] == [101]


def test_a_few_common_tokens_are_not_worth_a_pass() -> None:
    short = [[1, 2, *HAYSTACK], [1, 2, *HAYSTACK[::-1]]]
    assert prefix_tree(short, [102, 102]).end == 0


def test_a_single_sequence_is_a_leaf() -> None:
    assert prefix_tree([[1, 2, 3]], [2]) == PrefixNode(0, [0], [])


def test_a_long_chain_of_nested_beginnings_is_no_deep_tree() -> None:
    step, count = LEAST_SAVED, 1300
    chain = [list(range(step * (i + 1))) for i in range(count)]
    tree = prefix_tree(chain, [len(sequence) - 1 for sequence in chain])
    assert sorted(tree.sequences()) == list(range(count))
    reached = list(passes(chain, tree))
    assert len(reached) == count
    assert max(map(len, reached)) == MOST_LEVELS + 1  # and the sequence's own pass
    for sequence, ends in zip(tree.sequences(), reached, strict=True):
        assert ends == sorted(set(ends)) and ends[-1] == len(chain[sequence])


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=8), st.data())
def test_the_walk_meets_every_sequence_once_behind_its_own_beginning(sequences: list[list[int]], data: st.DataObject):
    reusable = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    tree = prefix_tree(sequences, reusable)
    assert sorted(tree.sequences()) == list(range(len(sequences)))

    def check(node: PrefixNode, done: int) -> None:
        below = list(node.sequences())
        assert len({tuple(sequences[i][: node.end]) for i in below}) == 1
        assert all(reusable[i] >= node.end for i in below)
        assert node.end == done or (len(below) - 1) * (node.end - done) >= LEAST_SAVED
        for child in node.children:
            check(child, node.end)

    check(tree, 0)
    assert computed(tree, sequences) <= sum(map(len, sequences))


def test_contexts_that_share_their_first_token_only_share_what_each_of_them_begins_with():
    """As prompts without a chat template do, which all begin with the same special token."""
    sequences = [[0, context, *[7] * 30, question] for context in (1, 2) for question in (3, 4, 5)]
    tree = prefix_tree(sequences, [32] * 6)
    assert (tree.end, tree.leaves) == (0, [])
    assert [(child.end, sorted(child.leaves)) for child in tree.children] == [(32, [0, 1, 2]), (32, [3, 4, 5])]
