"""Tuned-lens directions: what the files say, which way the matrix is turned, and what the scores are through them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.architecture import attention_layers
from locos_fast.ops.exact import exact
from locos_fast.scoring.detectors import LayerEvidence
from locos_fast.scoring.directions import Target, pull_back, token_directions
from locos_fast.scoring.prompt_parts import PromptParts, Rows
from locos_fast.scoring.recording import record
from locos_fast.scoring.score import score_tokens
from locos_fast.scoring.tuned_lens import TunedLens
from tests.oracles.architecture_models import build
from tests.oracles.definition import ANSWER, LENGTH, naive
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import tokens

HIDDEN, LAYERS = 32, 3
NEEDLE = (10, 20)
ROWS = [position - 1 for position in ANSWER]
ROUNDING = 2e-6  # transformers' eager softmax and all norms work in float32 in any dtype

Translators = dict[int, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def random_translators(layers: int = LAYERS, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> Translators:
    """Residual form; far from symmetric, and far from orthogonal with the identity."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {number: (draw(hidden, hidden) / 4, draw(hidden)) for number in range(layers)}


def whole(translators: Translators) -> dict[int, dict[str, Tensor]]:
    return {number: {"A": A + torch.eye(len(A), dtype=A.dtype), "b": b} for number, (A, b) in translators.items()}


def flat(translators: Translators, prefix: str = "") -> dict[str, Tensor]:
    named = {f"{prefix}{number}.weight": A for number, (A, _) in translators.items()}
    return named | {f"{prefix}{number}.bias": b for number, (_, b) in translators.items()}


def saved(folder: Path, data: Any, name: str = "lens.pt") -> Path:
    path = folder / name
    save_file(data, path) if path.suffix == ".safetensors" else torch.save(data, path)
    return path


# --- directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direction_and_bias_are_the_logit_behind_the_translator(dtype: torch.dtype) -> None:
    """d . (h + A h + b) = direction . h + bias: with A the wrong way round it would be another number."""
    translators = random_translators()
    lens, d, h = TunedLens(translators), torch.randn(5, HIDDEN, dtype=dtype), torch.randn(HIDDEN).double()
    for layer, (A, b) in translators.items():
        expected = d.double() @ (h + A.double() @ h + b.double())
        direction, bias = lens.direction(layer, d), lens.bias(layer, d)
        assert direction.dtype == bias.dtype == dtype
        assert direction.shape == (5, HIDDEN)
        assert bias.shape == (5,)
        found = direction.double() @ h + bias.double()
        bound = 64 * torch.finfo(dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() < bound
        turned = d.double() + d.double() @ A.double().T
        assert (turned @ h + bias.double() - expected).abs().max() > 1e4 * bound


def test_a_matrix_in_half_precision_is_multiplied_in_the_directions_own() -> None:
    A, b = random_translators(1)[0]
    half = TunedLens({0: (A.bfloat16(), b.bfloat16())})
    d = torch.randn(3, HIDDEN)
    torch.testing.assert_close(half.direction(0, d), d + d @ A.bfloat16().float(), rtol=1e-5, atol=1e-5)


# --- files


@pytest.mark.parametrize("layout", ["whole", "whole, wrapped", "flat", "flat, prefixed", "flat, with other names"])
def test_every_published_layout_is_read(tmp_path: Path, layout: str) -> None:
    translators = random_translators()
    data: dict[str, Any] = {
        "whole": whole(translators),
        "whole, wrapped": {"translators": whole(translators), "loss": np.float64(0.5), "step": np.int64(3)},
        "flat": flat(translators),
        "flat, prefixed": flat(translators, "layer_translators."),
        "flat, with other names": flat(translators) | {"unembed.unembedding.weight": torch.ones(9, HIDDEN)},
    }
    lens = TunedLens.load(saved(tmp_path, data[layout]))
    d = torch.randn(2, HIDDEN)
    assert lens.layers == [0, 1, 2]
    for layer, (A, b) in translators.items():
        torch.testing.assert_close(lens.direction(layer, d), d + d @ A, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lens.bias(layer, d), d @ b, rtol=1e-5, atol=1e-5)


def test_safetensors_hold_the_same_lens(tmp_path: Path) -> None:
    data, d = flat(random_translators()), torch.randn(2, HIDDEN)
    lenses = [TunedLens.load(saved(tmp_path, data, name)) for name in ("lens.pt", "lens.safetensors")]
    for layer in range(LAYERS):
        a, b = (lens.direction(layer, d) for lens in lenses)
        assert torch.equal(a, b)


def test_the_identity_is_taken_from_half_precision_without_loss(tmp_path: Path) -> None:
    A, b = random_translators(1)[0]
    data = {0: {"A": (A + torch.eye(HIDDEN)).bfloat16(), "b": b.bfloat16()}}
    d = torch.randn(2, HIDDEN)
    found = TunedLens.load(saved(tmp_path, data)).direction(0, d)
    torch.testing.assert_close(found, d @ data[0]["A"].float(), rtol=1e-5, atol=1e-5)


def test_numbers_of_older_numpy_are_read(tmp_path: Path) -> None:
    """It keeps them in numpy.core, of which newer releases warn."""
    new, old = saved(tmp_path, {"translators": whole(random_translators()), "loss": np.float64(1)}), tmp_path / "old.pt"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item).replace(b"numpy._core.multi", b"numpy.core.multi"))
    assert b"numpy.core.multi" in old.read_bytes()
    assert TunedLens.load(old).layers == [0, 1, 2]


class Code:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_in_one_line_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, ran = tmp_path / "lens.pt", tmp_path / "ran"
    torch.save({0: Code(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"lens\.pt: holds more than tensors .* is not loaded") as error:
        TunedLens.load(path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not ran.exists()


EYE, ZERO = torch.eye(4), torch.zeros(4)
BROKEN: list[tuple[Any, str]] = [
    ([1], "expected a tuned lens .*, got list"),
    ({}, "expected a tuned lens .*, got a dict of nothing"),
    ({"lm_head": EYE}, "expected a tuned lens .*, got a dict of 'lm_head'"),
    ({0: EYE}, 'layer 0: expected tensors "A" and "b", got Tensor'),
    ({0: {"A": EYE}}, """layer 0: expected tensors "A" and "b", got a dict of 'A'"""),
    ({0: {"A": EYE, "b": ZERO}, 1: {"A": EYE[:3], "b": ZERO}}, r"layer 1: expected a square matrix, got \(3, 4\)"),
    (
        {0: {"A": EYE, "b": ZERO}, 1: {"A": torch.eye(5), "b": ZERO}},
        r"layer 1: expected \(4, 4\) floating, got \(5, 5\)",
    ),
    ({0: {"A": EYE, "b": ZERO[:3]}}, r"layer 0: expected \(4,\) floating, got \(3,\)"),
    ({"0.weight": EYE}, r"layer 0: expected 0\.bias, got none"),
    ({"0.weight": EYE, "0.bias": ZERO, "1.bias": ZERO}, r"layer 1: expected 1\.weight, got none"),
    ({"0.weight": EYE.int(), "0.bias": ZERO}, r"layer 0: expected \(4, 4\) floating, got \(4, 4\) torch.int32"),
    ({"0.weight": EYE * torch.nan, "0.bias": ZERO}, "layer 0: holds NaN or infinity"),
]


@pytest.mark.parametrize(("data", "match"), BROKEN)
def test_other_content_names_the_file_and_the_layer(tmp_path: Path, data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=rf"lens\.pt: {match}"):
        TunedLens.load(saved(tmp_path, data))


@pytest.mark.parametrize("name", ["lens.pt", "lens.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = saved(tmp_path, flat(random_translators()), name)
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with pytest.raises(ValueError, match=name) as error:
        TunedLens.load(path)
    assert "\n" not in str(error.value)


def test_paths_without_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no such file"):
        TunedLens.load(tmp_path / "lens.pt")
    with pytest.raises(ValueError, match="got a folder"):
        TunedLens.load(tmp_path)


# --- against the model


def test_a_lens_of_the_model_passes() -> None:
    TunedLens(random_translators()).check(build("llama"))
    TunedLens(random_translators(LAYERS + 1)).check(build("llama"))  # and one for what the last layer returns
    TunedLens({0: random_translators()[0], 2: random_translators()[2]}).check(build("qwen3_next"))  # 1 is linear


@pytest.mark.parametrize(
    ("translators", "match"),
    [
        (random_translators(1), "there.pt: expected a translator for each layer, got none for 1, 2"),
        (random_translators(LAYERS + 2), "there.pt: expected the translators of 3 layers, got one for layer 4"),
        (random_translators(hidden=48), r"there.pt: layer 0: expected \(32, 32\).*, got \(48, 48\)"),
    ],
)
def test_a_lens_of_another_model_names_the_file_and_the_layer(translators: Translators, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TunedLens(translators, source="there.pt").check(build("llama"))


def test_a_layer_without_translator_is_named() -> None:
    lens = TunedLens(random_translators(1), source="there.pt")
    for ask in (lens.direction, lens.bias):
        with pytest.raises(ValueError, match=r"there.pt: expected a translator for layer 2, got none"):
            ask(2, torch.zeros(1, HIDDEN))


def test_no_translators_are_no_lens() -> None:
    with pytest.raises(ValueError, match="translators: expected translators, got none"):
        TunedLens({})


# --- scores


@torch.inference_mode()
def sums(model: PreTrainedModel, ids: Tensor, lens: TunedLens) -> dict[int, tuple[Tensor, Tensor]]:
    """As a detector would use the lens, on models without a gate between heads and projection."""
    with record(model, ROWS, [NEEDLE]) as recording:
        model(input_ids=ids[:, : max(ANSWER)], use_cache=False)
    d, result = token_directions(model, Target(ids[0, ANSWER])), {}
    with exact():
        for layer in attention_layers(model):
            kept = recording[layer.number]
            w = pull_back(layer.projection, lens.direction(layer.number, d)).view(kept.output[0].shape)
            offsets = {"lens": lens.bias(layer.number, d)}
            evidence = LayerEvidence(
                kept, Rows.of(ANSWER, None), {"lens": w}, ids[0], [NEEDLE], ids[0, ANSWER], offsets
            )
            found = evidence.sums("lens")
            result[layer.number] = (found.l_plus, found.total)
    return result


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gpt2"])
def test_sums_equal_those_over_positions_in_float64(family: str) -> None:
    """phi = alpha (w' . v + d . b), one position after the other: group sharing, windows, sinks, a transposed
    projection."""
    model, ids = build(family), tokens(1, LENGTH)
    translators = random_translators(dtype=torch.float64)
    found, truth = sums(model, ids, TunedLens(translators)), naive(model, family, ids)
    d = model.get_output_embeddings().weight.detach()[ids[0, ANSWER]]  # (T, hidden)
    for layer in attention_layers(model):
        A, b = translators[layer.number]
        weight = layer.projection.weight.detach()
        weight = weight if family == "gpt2" else weight.T  # (heads * Dv, hidden)
        alpha, values, _ = truth.attended[layer.number]
        expected = torch.zeros(2, len(ROWS), len(alpha), dtype=torch.float64)
        for t, row in enumerate(ROWS):
            for head in range(len(alpha)):
                width = values.shape[-1]
                w = weight[head * width : (head + 1) * width] @ (d[t] + A.T @ d[t])
                phi = [alpha[head, row, j].item() * (w @ values[head, j] + d[t] @ b).item() for j in range(row + 1)]
                expected[:, t, head] = torch.tensor([sum(phi[slice(*NEEDLE)]), sum(phi)])
        for actual, wanted in zip(found[layer.number], expected, strict=True):
            assert (actual - wanted).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_lens_that_changes_nothing_gives_the_plain_score(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    nothing = {number: (torch.zeros(HIDDEN, HIDDEN), torch.zeros(HIDDEN)) for number in range(LAYERS)}
    scores = score_tokens(model, ids, NEEDLE, ANSWER)
    for number, (span, total) in sums(model, ids, TunedLens(nothing)).items():
        for found, expected in ((total.mean(0), scores.dla[number]), (span.mean(0), scores.l_plus[number])):
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12 * abs(scores.dla).max())


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_scores_through_a_lens_come_along_with_the_others(family: str) -> None:
    model, ids = build(family), tokens(1, LENGTH)
    parts = PromptParts(prompt_tokens=min(ANSWER))
    translators = random_translators(dtype=torch.float64)
    found = score_tokens(model, ids, NEEDLE, ANSWER, parts=parts, lens=TunedLens(translators)).others
    plain = score_tokens(model, ids, NEEDLE, ANSWER, parts=parts)
    assert set(found) - set(plain.others) == {"locos_tuned_lens"}
    nothing = {number: (torch.zeros(HIDDEN, HIDDEN), torch.zeros(HIDDEN)) for number in range(LAYERS)}
    same = score_tokens(model, ids, NEEDLE, ANSWER, parts=parts, lens=TunedLens(nothing)).others["locos_tuned_lens"]
    np.testing.assert_allclose(same, plain.score, rtol=0, atol=1e-12 * abs(plain.dla).max())
    assert abs(found["locos_tuned_lens"] - plain.score).max() > 0.01 * abs(plain.score).max()
    with pytest.raises(ValueError, match="lens: needs parts"):
        score_tokens(model, ids, NEEDLE, ANSWER, lens=TunedLens(nothing))
