"""Tables of spans on the device: copied once, kept for the last few sets of spans, and for good where a CUDA graph
points to them."""

import gc
import weakref

import pytest
import torch

from locos_fast.ops import triton_spans
from locos_fast.ops.triton_spans import SpanPlan

CPU = torch.device("cpu")


def table_of(first: int) -> torch.Tensor:
    """The starts of a plan that no other test asks for."""
    spans = torch.tensor([[(first, first + 3), (first + 7, first + 9)]])
    return SpanPlan.of(spans, 1, 5000, 64, CPU).start


def ask_for_others(first: int) -> None:
    for other in range(2 * triton_spans.KEPT):
        table_of(first + 10 * (other + 1))
    gc.collect()


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_the_same_spans_are_copied_once():
    assert table_of(1) is table_of(1)


def test_other_spans_take_the_place_of_old_ones():
    table = weakref.ref(table_of(1001))
    ask_for_others(1001)
    assert table() is None


def test_a_captured_graph_keeps_its_tables(capturing, monkeypatch):
    """It reads the addresses that it was captured with, whatever is asked for afterwards."""
    table = weakref.ref(table_of(2001))
    monkeypatch.undo()
    ask_for_others(2001)
    assert table() is not None


@pytest.mark.parametrize(
    ("spans", "unrolled"),
    [([(0, 500)], 1), ([(0, 20), (20, 40)], 16), ([(i, i + 4) for i in range(0, 800, 4)], 16)],
)
def test_few_spans_in_a_tile_are_unrolled_and_many_looped_over(spans, unrolled):
    assert SpanPlan.of(torch.tensor([spans]), 1, 1000, 32, CPU).unrolled == unrolled
    single_tokens = torch.tensor([[(i, i + 1) for i in range(1000)]])
    assert SpanPlan.of(single_tokens, 1, 1000, 32, CPU).unrolled == 0
