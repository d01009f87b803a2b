"""Memory that the torch backend allocates: blocks, however long the context; keys and values are never repeated."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locos_fast.ops import torch_backend, torch_softmax
from tests.oracles.attention_problem import random_problem, random_weights_problem
from tests.oracles.threads import one_thread


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all tensors alive that PyTorch operations made while the mode was on."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.inputs = {StorageWeakRef(x.untyped_storage()).cdata for x in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.inputs:
                    self.alive[ref.cdata] = ref, storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


MANY_BLOCKS = (32, 512)  # a number kept per row and block would take twice what the test allows


def memory(function: str, keys: int, layout: str) -> LiveBytes:
    """What a call on `keys` keys allocates; the span reaches into the last block, so that what was kept counts."""
    spans = [(keys - torch_backend.BLOCK - 50, keys - torch_backend.BLOCK + 50)]
    sizes = {"kv_heads": 2, "group": 8, "rows": 3, "dtype": torch.bfloat16, "layout": layout}
    if function == "ov_contribution":
        problem = random_weights_problem(keys=keys, spans=spans, value_dim=64, **sizes)
        call = problem.contributions
    else:
        problem = random_problem(keys=keys, spans=spans, head_dim=64, **sizes)
        call = problem.contributions if function == "attention_contribution" else problem.summary
    call("torch")  # the plan of the spans is kept: 8 bytes for every 128 keys
    with LiveBytes(problem.tensors) as live:
        result = call("torch")
    assert result.mass.shape[-1] == 1
    return live


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("function", ["attention_contribution", "attention_summary", "ov_contribution"])
def test_memory_of_the_torch_backend_does_not_grow_with_the_context(function, layout):
    short, long = (memory(function, keys, layout) for keys in (blocks * torch_backend.BLOCK for blocks in MANY_BLOCKS))
    table_of_spans = (MANY_BLOCKS[1] - MANY_BLOCKS[0]) * torch_backend.BLOCK * 8 / 128  # 8 bytes per 128 keys
    few_rows = (
        torch_softmax.FEW * 2 * 8 * 3 * torch_backend.BLOCK * 4
    )  # copied where a row's largest score lies in a block
    assert abs(long.peak - short.peak) <= table_of_spans + few_rows
    assert long.largest == short.largest


@pytest.mark.parametrize("function", ["attention_contribution", "attention_summary", "ov_contribution"])
def test_keys_and_values_are_never_repeated(function):
    """The largest allocation is a float32 block of keys, of values or of scores; eight query heads share a key head."""
    keys_block = 2 * torch_backend.BLOCK * 64 * 4
    scores_block = 2 * 8 * 3 * torch_backend.BLOCK * 4
    assert memory(function, 4 * torch_backend.BLOCK, "contiguous").largest <= max(keys_block, scores_block)


def test_position_contribution_allocates_its_result_and_blocks_only():
    problem = random_problem(kv_heads=2, group=8, rows=3, keys=16 * torch_backend.BLOCK, head_dim=64)
    with LiveBytes(problem.tensors) as live:
        phi = problem.positions("torch")
    block = (
        2 * torch_backend.BLOCK * 64 * 4 + 4 * 48 * torch_backend.BLOCK * 4
    )  # keys, and scores with their by-products
    assert live.largest == phi.nbytes
    assert live.peak <= phi.nbytes + 2 * block
