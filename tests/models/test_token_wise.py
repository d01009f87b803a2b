"""Which modules are taken to treat every token on its own: shown by experiment, whatever their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from locos_fast.models.architecture import decoder_layers
from locos_fast.models.token_chunks import TokenCall, run_in_chunks, token_chunks, token_wise
from tests.oracles import tiny_models

TOKENS = 23  # four chunks of five and one of three
SIZE = 5
ROUNDING = 1e-13  # matrix products of other shapes round differently, relative to the largest logit


def run(model, size):
    with torch.inference_mode(), token_chunks(model, size) as names:
        return model(tiny_models.tokens(2, TOKENS), use_cache=False).logits, names


def difference(a, b):
    """Relative to the largest."""
    return float((a - b).abs().max() / b.abs().max())


class CentredOverTokens(nn.Module):
    """Commutes with any permutation of the tokens, and mixes them all the same."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class CausalConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.tensor([[[0.5, 1.0]]]).expand(32, 1, 2).clone())

    def forward(self, x):
        padded = nn.functional.pad(x.mT, (1, 0))
        return nn.functional.conv1d(padded, self.kernel.to(x), groups=32).mT


class RunningSum(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


class CountsTokens(nn.Module):
    def forward(self, x):
        return x + torch.arange(x.shape[1])[:, None]


class Reverses(nn.Module):
    def forward(self, x):
        return x.flip(1)


class NormedByAll(nn.Module):
    def forward(self, x):
        return x / x.norm()


class WritesIntoItsInput(nn.Module):
    def forward(self, x):
        return x.mul_(2.0)


class LimitedExperts(nn.Module):
    """Two experts that take as many tokens each as there are on average and a quarter more; the rest are dropped."""

    def forward(self, x):
        tokens = x.flatten(0, -2)
        expert = nn.functional.one_hot((tokens[:, 0] > 0).long(), 2)
        rank = (expert.cumsum(0) * expert).sum(-1)
        return torch.where((rank <= 1.25 * len(tokens) / 2)[:, None], tokens, 0.0).view_as(x)


class FixedExperts(nn.Module):
    """Like those, but with room for 40 tokens each: only a crowd overflows it."""

    def forward(self, x):
        tokens = x.flatten(0, -2)
        choice = torch.stack([tokens[:, 0], -tokens[:, 0]], -1).topk(1).indices[:, 0]
        expert = nn.functional.one_hot(choice, 2)
        rank = (expert.cumsum(0) * expert).sum(-1)
        return torch.where((rank <= 40)[:, None], tokens, 0.0).view_as(x)


class RefusesFewTokens(nn.Module):
    def forward(self, x):
        if x.shape[1] != TOKENS:
            raise RuntimeError("made for one length")
        return x


MIXING = [CentredOverTokens, CausalConvolution, RunningSum, CountsTokens, Reverses, NormedByAll]
UNFIT = [WritesIntoItsInput, RefusesFewTokens]


def called(*args, axis=1, **kwargs):
    return TokenCall(args, kwargs, axis, args[0].shape[axis])


def decided(forward, call):
    return token_wise(nn.Identity(), forward, call)


class TestTheExperiment:
    @pytest.mark.parametrize("kind", [*MIXING, *UNFIT])
    def test_what_is_not_token_wise_is_left_alone(self, kind):
        model = tiny_models.build("llama", dtype=torch.float64)
        decoder_layers(model)[0].mlp = kind().eval()
        whole, _ = run(model, None)
        chunked, names = run(model, SIZE)
        assert not [name for name in names if name.startswith("layers.0.mlp")]
        assert "layers.1.mlp" in names
        assert difference(chunked, whole) <= ROUNDING

    def test_a_convolution_is_not_even_tried(self):
        class Short(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv1d(32, 32, 3, padding=1)
                self.calls = 0

            def forward(self, x):
                self.calls += 1
                return self.conv(x.mT).mT

        model = tiny_models.build("llama")
        decoder_layers(model)[0].mlp = short = Short().eval()
        _, names = run(model, SIZE)
        assert "layers.0.mlp" not in names
        assert short.calls == 1

    def test_tensors_along_the_tokens_are_cut_with_them(self):
        x, gate = torch.randn(2, TOKENS, 6), torch.randn(2, TOKENS, 1)
        call = called(x, gate=gate, scale=torch.tensor(3.0), bias=torch.randn(6))

        def forward(x, gate, scale, bias):
            return x * gate * scale + bias

        assert decided(forward, call)
        assert torch.equal(run_in_chunks(forward, call, SIZE), forward(*call.args, **call.kwargs))

    def test_a_mask_between_tokens_is_not_cut(self):
        def forward(x, mask):
            return torch.einsum("bnm,bmd->bnd", mask[:, 0], x)

        assert not decided(forward, called(torch.randn(1, TOKENS, 6), torch.randn(1, 1, TOKENS, TOKENS)))

    @pytest.mark.parametrize("batch", [1, 3])
    def test_every_output_of_a_tuple_is_put_together(self, batch):
        def forward(x):  # hidden states, none, router logits as a flat list, experts chosen
            logits = x.flatten(0, -2)[:, :5]
            return x * 2, None, logits, logits.topk(2).indices

        call = called(torch.randn(batch, TOKENS, 6))
        assert decided(forward, call)
        whole, parts = forward(*call.args), run_in_chunks(forward, call, SIZE)
        assert isinstance(parts, tuple)
        assert parts[1] is None
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True) if a is not None)

    def test_experts_may_be_as_many_as_tokens_in_a_chunk(self):
        call = called(torch.randn(1, TOKENS, 6))
        forward = lambda x: x.flatten(0, 1)[:, :SIZE]  # (B * tokens, experts)
        assert torch.equal(run_in_chunks(forward, call, SIZE), forward(*call.args))

    @pytest.mark.parametrize(
        "dtype, flips, allowed",
        [(torch.bfloat16, 2, True), (torch.bfloat16, 9, False), (torch.float32, 1, False), (torch.float32, 0, True)],
    )
    def test_near_ties_of_a_router_do_not_decide_in_half_precision(self, dtype, flips, allowed):
        """Of 63 tokens 12 % may differ in bfloat16, and none in float32."""

        def forward(x):
            chosen = x.topk(2).values.sum(-1, keepdim=True)
            x = x + chosen
            if x.shape[1] > 16:  # the whole
                x[:, :flips] += 1.0
            return x

        assert decided(forward, called(torch.randn(1, 100, 6).to(dtype))) is allowed

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_token_that_differs_where_nothing_is_chosen_decides(self, dtype):
        def forward(x):
            return torch.cat([x[:, :1] * 2, x[:, 1:]], 1)

        assert not decided(forward, called(torch.randn(1, 100, 6).to(dtype)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", [LimitedExperts, FixedExperts])
    def test_experts_that_drop_tokens_are_left_alone(self, kind, dtype):
        assert not decided(kind().forward, called(torch.randn(1, 100, 6).to(dtype)))

    @pytest.mark.parametrize("forward", [lambda x: [x], lambda x: x[:, :3], lambda x: x.sum(), lambda x: x / 0])
    def test_other_outputs_are_left_alone(self, forward):
        assert not decided(forward, called(torch.randn(1, TOKENS, 6)))

    def test_random_numbers_of_the_caller_are_untouched(self):
        model = tiny_models.build("qwen3")
        before = torch.get_rng_state()
        run(model, SIZE)
        assert torch.equal(torch.get_rng_state(), before)
