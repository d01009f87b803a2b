"""How much one forward pass over 100,000 tokens takes above the weights, counted without doing it.

All tensors are fake: operators work out shapes, and neither compute nor take memory. A dispatch mode adds up the
storages that are alive after every operator. Scaled dot product attention is one operator there, charged with its
output, as fused attention is; any mask or repeated key that is built for it is charged in full.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config

from locos_fast.models import token_chunks as chunking
from locos_fast.models.architecture import decoder
from locos_fast.models.memory_estimate import estimate
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from tests.oracles import tiny_models

GIB = 2**30
TOKENS = 100_000
ROWS = 8
GOAL = 6 * GIB
# Qwen3-8B, of whose 36 equal layers three are enough: the last layer's intermediates are gone when the next one starts
QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


class LiveBytes(TorchDispatchMode):
    """Adds up the storages made inside the context that are still alive, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()  # not made here: weights and inputs
        self.alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.peak = 0
        self.at_peak: list[str] = []

    def leave_out(self, *tensors: torch.Tensor) -> None:
        self.known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        returned = operator(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.alive:
                    label = f"{storage.nbytes() / GIB:.2f} GiB {operator} {tuple(tensor.shape)} {tensor.dtype}"
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), label)
        total = sum(size for _, size, _ in self.alive.values())
        if total > self.peak:
            self.peak, self.at_peak = total, [label for _, size, label in self.alive.values() if size > GIB / 100]
        return returned


@pytest.fixture
def fake():
    return FakeTensorMode()


@pytest.fixture
def model(fake):
    """The 8B shape in bfloat16, without any weights."""
    with fake:
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**QWEN3_8B), attn_implementation="sdpa", dtype=torch.bfloat16
        )
    return model.eval()


@pytest.fixture
def chunked_in_a_twin(model, monkeypatch):
    """Values cannot be compared where there are none: what is token-wise is found out on a small model of the kind."""
    twin = tiny_models.build("qwen3")
    with torch.inference_mode(), token_chunks(twin, 5) as names:
        twin(tiny_models.tokens(1, 23), use_cache=False)
    token_wise = {id(decoder(model).get_submodule(name)) for name in names}
    monkeypatch.setattr(chunking, "token_wise", lambda module, forward, call: id(module) in token_wise)
    return names


def count(fake, model, size):
    """Live bytes of a forward pass over 100,000 tokens at their peak, and what was alive then."""
    with fake:
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        rows = torch.zeros(ROWS, dtype=torch.int64)
    counter = LiveBytes()
    counter.leave_out(*model.parameters(), *model.buffers(), ids, rows)
    with torch.inference_mode(), fake, token_chunks(model, size), counter:
        # of fake tokens it cannot be read that they are one sequence: say that, as for real ones, no mask is needed
        model(ids, attention_mask={"full_attention": None}, use_cache=False, logits_to_keep=rows)
    return counter.peak, "\n".join(counter.at_peak)


def test_count_follows_storages_and_not_views(fake):
    with fake, LiveBytes() as counter:
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes with a
        del a
        c = b[:10] * 2
        del b
        d = torch.zeros(500).view(5, 100)  # 2040 bytes with c
    assert counter.peak == 8000
    assert sum(size for _, size, _ in counter.alive.values()) == c.numel() * 4 + d.numel() * 4


def test_one_sequence_is_attended_without_a_mask(monkeypatch):
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, attn_mask, **kwargs: masks.append(attn_mask) or attend(*args, attn_mask=attn_mask, **kwargs),
    )
    with torch.inference_mode():
        tiny_models.build("qwen3", "sdpa")(tiny_models.tokens(1, 23), use_cache=False)
    assert masks == [None, None, None]


def test_100k_tokens_of_an_8b_model_take_at_most_6_gib_above_the_weights(fake, model, chunked_in_a_twin, capsys):
    assert {"layers.0.mlp", "layers.0.self_attn.q_norm", "norm"} <= chunked_in_a_twin
    whole, _ = count(fake, model, None)
    chunked, alive = count(fake, model, TOKENS_PER_CHUNK)
    with capsys.disabled():
        print(f"\n100,000 tokens, 8B: {whole / GIB:.2f} GiB above the weights, {chunked / GIB:.2f} GiB in token chunks")
    assert whole > GOAL  # or there would be nothing to do
    assert chunked <= GOAL, f"{chunked / GIB:.2f} GiB:\n{alive}"
    estimated = estimate(model.config, TOKENS, torch.bfloat16, "sdpa").activations  # what runs are refused by
    assert chunked <= estimated <= 1.2 * chunked
