"""Which keys a row sees, against loops over the definition; the tests of the tensor functions take it for granted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locos_fast.ops.visibility import Visibility, count_span_visible, count_visible


def sees(row: int, slot: int, *, window: int | None, chunk: int | None, padding: int) -> bool:
    """The definition: causal, not padding, not out of the window (which counts the row itself), in the row's chunk."""
    return (
        padding <= slot <= row
        and (window is None or row - slot < window)
        and (chunk is None or (row - padding) // chunk == (slot - padding) // chunk)
    )


lengths = st.none() | st.integers(1, 20)


@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(0, 9),
    lengths,
    lengths,
)
@settings(max_examples=60)
def test_causal_visibility_is_its_definition(seed, batch, rows, keys, kv_offset, window, chunk):
    torch.manual_seed(seed)
    padding = torch.randint(0, kv_offset + keys, (batch,))
    positions = (
        torch.randint(0, kv_offset + keys, (batch, rows)) if seed % 2 else torch.randint(0, kv_offset + keys, (rows,))
    )
    key_mask = torch.rand(batch, keys) < 0.7
    visibility = Visibility.causal(
        positions, kv_offset=kv_offset, window=window, chunk=chunk, left_padding=padding, key_mask=key_mask
    )
    expected = torch.tensor(
        [
            [
                [
                    bool(key_mask[b, j]) and sees(p, kv_offset + j, window=window, chunk=chunk, padding=int(padding[b]))
                    for j in range(keys)
                ]
                for p in positions.expand(batch, rows)[b].tolist()
            ]
            for b in range(batch)
        ]
    )
    assert torch.equal(visibility.mask(batch, keys), expected)
    assert torch.equal(count_visible(visibility, batch, keys), expected.sum(-1))

    start = torch.randint(0, kv_offset + keys + 5, (batch, 4, 1))
    spans = torch.cat([start, start + torch.randint(1, keys + 5, start.shape)], -1)
    for b in range(batch):
        for s, (a, e) in enumerate(spans[b].tolist()):
            inside = expected[b, :, max(0, a - kv_offset) : max(0, e - kv_offset)]
            assert torch.equal(count_span_visible(visibility, spans, batch, keys)[b, :, s], inside.sum(-1))


def test_a_row_sees_itself_and_what_is_before_it():
    assert Visibility.causal(torch.tensor([0, 2])).mask(1, 4).int().tolist() == [[[1, 0, 0, 0], [1, 1, 1, 0]]]


def test_a_window_of_one_is_the_row_itself():
    assert Visibility.causal(torch.tensor([2]), window=1).mask(1, 4).int().tolist() == [[[0, 0, 1, 0]]]


def test_chunks_are_counted_from_the_first_slot_that_is_not_padding():
    visibility = Visibility.causal(torch.tensor([5]), chunk=4, left_padding=torch.tensor([0, 3]))
    assert visibility.mask(2, 6).int().tolist() == [[[0, 0, 0, 0, 1, 1]], [[0, 0, 0, 1, 1, 1]]]


def test_a_column_is_the_slot_kv_offset_later():
    visibility = Visibility.causal(torch.tensor([12]), kv_offset=10)
    assert visibility.mask(1, 5).int().tolist() == [[[1, 1, 1, 0, 0]]]
    assert count_visible(visibility, 1, 5).tolist() == [[3]]


@pytest.mark.parametrize("bounds", ["shared", "per batch row", "mixed"])
def test_bounds_may_be_shared_by_the_batch_or_not(bounds):
    first, last = torch.tensor([0, 1]), torch.tensor([[3, 4], [3, 4]])
    visibility = {
        "shared": Visibility(first, last[0]),
        "per batch row": Visibility(first.expand(2, 2), last),
        "mixed": Visibility(first, last),
    }[bounds]
    assert count_visible(visibility, 2, 10).tolist() == [[3, 3], [3, 3]]
