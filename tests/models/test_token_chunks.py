"""Chunking along the tokens changes how much memory a forward pass takes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from locos_fast.models.architecture import decoder, decoder_layers
from locos_fast.models.token_chunks import token_chunks
from locos_fast.scoring.head_scores import ARRAYS
from locos_fast.scoring.score import score_tokens
from tests.oracles import architecture_models, tiny_models

TOKENS = 23  # four chunks of five and one of three
SIZE = 5
# matrix products of other shapes round differently: a few rounding errors per layer, relative to the largest logit
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}
# whatever the model's dtype: what chunks of other shapes round differently there is worth 6e-8, not 1e-16
ROUTED_IN_FLOAT32 = {"llama4", "deepseek_v3"}


def build(family, *, dtype=torch.float64):
    return architecture_models.build(family, architecture_models.FAMILIES[family].implementations[0], dtype=dtype)


def run(model, size, *, batch=2):
    with torch.inference_mode(), token_chunks(model, size) as names:
        return model(tiny_models.tokens(batch, TOKENS), use_cache=False).logits, names


def difference(a, b):
    """Relative to the largest."""
    return float((a - b).abs().max() / b.abs().max())


def state(model):
    """Every attribute and hook of every module."""
    return {name: {key: (id(x), str(x)) for key, x in vars(m).items()} for name, m in model.named_modules()}


def in_layer(names, number):
    """Names within one layer."""
    start = f"layers.{number}."
    return {name.removeprefix(start) for name in names if name.startswith(start)}


class TestSameLogits:
    @pytest.mark.parametrize("family", architecture_models.FAMILIES)
    def test_chunks_give_the_logits_of_the_whole(self, family):
        model = build(family)
        whole, _ = run(model, None)
        chunked, names = run(model, SIZE)
        allowed = ROUNDING[torch.float32 if family in ROUTED_IN_FLOAT32 else torch.float64]
        assert difference(chunked, whole) <= allowed
        layers = range(len(decoder_layers(model)))
        assert all(any(f".{layer}." in name for name in names) for layer in layers)

    @pytest.mark.parametrize("family", architecture_models.FAMILIES)
    def test_single_precision_loses_no_more_in_chunks_than_as_a_whole(self, family):
        exact, _ = run(build(family), None)
        model = build(family, dtype=torch.float32)
        (whole, _), (chunked, _) = run(model, None), run(model, SIZE)
        assert difference(chunked, exact) <= 2 * difference(whole, exact)

    @pytest.mark.parametrize("size", [None, TOKENS, TOKENS + 1])
    def test_nothing_is_chunked_that_fits_into_one_chunk(self, size):
        model = tiny_models.build("qwen3")
        chunked, names = run(model, size)
        assert names == set()
        assert torch.equal(chunked, model(tiny_models.tokens(2, TOKENS), use_cache=False).logits)

    @pytest.mark.parametrize("size", [1, TOKENS - 1])
    def test_chunks_of_any_size(self, size):
        model = tiny_models.build("llama4")
        assert difference(run(model, size)[0], run(model, None)[0]) <= ROUNDING[torch.float32]

    def test_generation_goes_on_token_by_token(self):
        model, prompt = tiny_models.build("qwen3"), tiny_models.tokens(1, TOKENS)
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
        with token_chunks(model, SIZE) as names:
            assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
        assert names

    def test_half_precision_is_chunked(self):
        model = build("qwen3_moe", dtype=torch.bfloat16)
        assert {"mlp", "input_layernorm"} <= in_layer(run(model, SIZE)[1], 0)

    def test_scores_are_those_of_the_whole(self):
        model = build("gemma3")
        ids = tiny_models.tokens(1, TOKENS)
        expected = score_tokens(model, ids, (4, 8), [19, 21], norm="frozen")
        with token_chunks(model, SIZE) as names:
            scores = score_tokens(model, ids, (4, 8), [19, 21], norm="frozen")
        assert names
        for name in ARRAYS:
            np.testing.assert_allclose(getattr(scores, name), getattr(expected, name), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("norm", ["none", "frozen"])
    @pytest.mark.parametrize("family", architecture_models.FAMILIES)
    def test_single_precision_scores_agree_to_a_millionth(self, family, norm):
        model, ids = build(family, dtype=torch.float32), tiny_models.tokens(1, TOKENS)
        whole = score_tokens(model, ids, (14, 18), [19, 21], norm=norm, token_chunk=None)
        with token_chunks(model, SIZE) as names:
            chunked = score_tokens(model, ids, (14, 18), [19, 21], norm=norm, token_chunk=None)
        assert names
        # Gemma 4 does not scale its attention scores down: their rounding is several times that of the others
        allowed = 5e-6 if family == "gemma4" else 1e-6
        for name in ARRAYS:
            np.testing.assert_allclose(getattr(chunked, name), getattr(whole, name), rtol=allowed, atol=allowed)


class TestWhatIsChunked:
    def test_norms_and_mlp_of_a_dense_model(self):
        _, names = run(tiny_models.build("qwen3"), SIZE)
        norms = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
        assert in_layer(names, 0) == in_layer(names, 2) == {"mlp"} | norms
        assert {name for name in names if not name.startswith("layers.")} == {"norm"}

    @pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
    def test_a_mixture_of_experts_is_chunked_as_one(self, family):
        _, names = run(build(family), SIZE)
        assert "mlp" in in_layer(names, 1)
        assert not any(name.startswith("mlp.") for name in in_layer(names, 1))

    def test_a_flat_list_of_tokens_is_chunked(self):
        _, names = run(build("gemma4_moe"), SIZE)
        assert {"router", "experts", "pre_feedforward_layernorm_2"} <= in_layer(names, 0)

    def test_linear_attention_is_never_chunked(self):
        model = build("qwen3_next")
        _, names = run(model, SIZE)
        linear = {name for name, _ in decoder(model).layers[1].linear_attn.named_modules(prefix="linear_attn")}
        assert in_layer(names, 1) & linear == {"linear_attn.norm"}
        assert "mlp" in in_layer(names, 1)

    @pytest.mark.parametrize("family", architecture_models.FAMILIES)
    def test_attention_and_positions_are_never_chunked(self, family):
        _, names = run(build(family), SIZE)
        assert not [name for name in names if name.split(".")[-1] in {"self_attn", "attn", "attention", "rotary_emb"}]

    def test_fused_operators_of_torch_gain_nothing(self):
        _, names = run(build("gpt2"), SIZE)
        assert names == {"h.0.mlp", "h.1.mlp", "h.2.mlp"}  # its norms are nn.LayerNorm

    def test_training_and_gradients_are_left_alone(self):
        model = tiny_models.build("llama")
        with token_chunks(model, SIZE) as names:
            model(tiny_models.tokens(1, TOKENS), use_cache=False).logits.sum().backward()
        assert names == set()
        assert run(model.train(), SIZE)[1] == set()


class TestPutBack:
    @pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "gpt2"])
    def test_model_is_as_before(self, family):
        model = build(family)
        before = state(model)
        run(model, SIZE)
        assert state(model) == before

    def test_model_is_as_before_after_an_exception(self):
        class Stopped(Exception):
            pass

        def stop(*_):
            raise Stopped

        model = tiny_models.build("llama")
        hook = decoder_layers(model)[1].mlp.register_forward_hook(stop)
        before = state(model)
        with pytest.raises(Stopped):
            run(model, SIZE)
        assert state(model) == before
        hook.remove()
        _, names = run(model, SIZE)  # and it can be chunked again
        assert "layers.1.mlp" in names

    def test_a_forward_of_the_instance_is_used_and_put_back(self):
        model = tiny_models.build("llama")
        mlp = decoder_layers(model)[0].mlp
        plain, seen = mlp.forward, []

        def forward(x):
            seen.append(x.shape[1])
            return plain(x)

        mlp.forward = forward
        _, names = run(model, SIZE)
        assert mlp.forward is forward
        assert "layers.0.mlp" in names
        assert seen[-5:] == [5, 5, 5, 5, 3]

    def test_offloaded_weights_are_chunked(self):
        accelerate = pytest.importorskip("accelerate")
        model = tiny_models.build("llama")
        whole, _ = run(model, None)
        accelerate.cpu_offload(model, execution_device="cpu")
        forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
        assert forwards["model.norm"] is not None  # accelerate's
        chunked, names = run(model, SIZE)
        assert {"norm", "layers.0.mlp"} <= names
        assert difference(chunked, whole) <= ROUNDING[torch.float32]
        assert {name: vars(module).get("forward") for name, module in model.named_modules()} == forwards

    def test_size_below_one_is_refused(self):
        with pytest.raises(ValueError, match="size: expected at least one token"), token_chunks(None, 0):
            pass


class TestHooks:
    def test_hooks_of_a_module_see_it_whole_and_once(self):
        model = tiny_models.build("llama")
        seen = []
        for module in (decoder_layers(model)[0].mlp, decoder_layers(model)[0].input_layernorm):
            module.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
        _, names = run(model, SIZE)
        assert {"mlp", "input_layernorm"} <= in_layer(names, 0)
        assert seen == [((2, TOKENS, 32), (2, TOKENS, 32))] * 2

    def test_a_hook_inside_keeps_the_module_whole(self):
        model = tiny_models.build("llama")
        seen = []
        hidden = decoder_layers(model)[0].mlp.down_proj
        hidden.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        _, names = run(model, SIZE)
        assert seen == [(2, TOKENS, 40)]
        assert "layers.0.mlp" not in names
        assert "layers.1.mlp" in names


# what a verdict rests on ---------------------------------------------------------------------------------------------


def chunked_error(model, ids):
    """How far the logits in chunks are from the whole, and what was chunked."""
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        with token_chunks(model, 5) as names:
            chunked = model(ids, use_cache=False).logits
    return float((whole - chunked).abs().max() / whole.abs().max()), names


def test_a_forward_that_was_replaced_is_shown_anew():
    """After a pass in chunks an MLP is given a forward that mixes tokens."""
    model, ids = tiny_models.build("llama"), tiny_models.tokens(1, 23)
    _, names = chunked_error(model, ids)
    mlp = decoder_layers(model)[1].mlp
    assert "layers.1.mlp" in names
    plain = mlp.forward
    mlp.forward = lambda x: plain(x - x.mean(1, keepdim=True))
    error, names = chunked_error(model, ids)
    assert error < 1e-5
    assert "layers.1.mlp" not in names and "layers.0.mlp" in names


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    model, ids = tiny_models.build("llama"), tiny_models.tokens(1, 23)
    mlp = decoder_layers(model)[1].mlp
    plain = type(mlp).forward

    def fails(self, x):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(type(mlp), "forward", fails)
        run_chunked(model, ids)
    assert type(mlp).forward is plain
    assert "layers.1.mlp" in chunked_error(model, ids)[1]


def run_chunked(model, ids):
    with torch.inference_mode(), token_chunks(model, 5):
        model(ids, use_cache=False)
