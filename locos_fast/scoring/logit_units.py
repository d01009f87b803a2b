"""True logit units: every part of the residual stream as a contribution to the answer's logit, and the proof that it
adds up.

The answer's direction is pulled back through the final norm with the scale of this forward pass, through the
multipliers and norms on the way, through the output projection and its gate, into each head's output space
(`norm="frozen"`). Then

    per layer    heads + biases = the layer's attention write, as a logit
    the model    embedding + heads + biases + everything else = the model's own logit, before any final softcap

hold exactly, up to rounding; how far they are off is measured on every forward, relative to the sum of the absolute
components. An identity that holds for the answer's direction leaves no room for a forgotten norm or multiplier. It says
nothing about how a head's output is split by the tokens it came from: that rests on what `models.head_map` shows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError, attention_layers
from locos_fast.models.norms import freeze
from locos_fast.models.residual_stream import AttentionPath, StreamTrace, attention_path, check_stream_passes
from locos_fast.scoring.directions import Target, bias_of, head_directions, token_directions
from locos_fast.scoring.recording import Recording

SLACK = 64  # rounding errors of the logits' dtype that a rescaled logit may differ by


class LayerAttribution(NamedTuple):
    """One attention layer, toward the answer's logit."""

    directions: Tensor  # (T, H, Dv): the dot product with a head's output is the head's contribution, in logits
    heads: Tensor  # (T, H) logits
    bias: Tensor  # (T,) logits that the layer's attention adds whatever its heads do
    write: Tensor  # (T,) logits that the stream received from this layer's attention, measured

    @property
    def residual(self) -> float:
        """How far heads + bias are from the write, relative to the sum of absolute components; the worst row."""
        size = self.heads.abs().sum(-1) + self.bias.abs()
        return _relative((self.heads.sum(-1) + self.bias - self.write).abs(), size)


class Attribution(NamedTuple):
    """A forward pass taken apart into contributions to the answer's logit."""

    layers: dict[int, LayerAttribution]
    embedding: Tensor  # (T,) logits
    others: Tensor  # (T,) logits from all other blocks (MLPs, linear attention ...)
    constant: Tensor  # (T,) logits from the biases of the final norm and of the unembedding
    logit: Tensor  # (T,) the model's own logit, before any softcap
    softcap: float | None  # the model caps its logits; contributions are to the logit before that

    @property
    def residual(self) -> float:
        """How far all components are from the model's logit, relative to the sum of their absolute values."""
        parts = [self.embedding, self.others, self.constant]
        for layer in self.layers.values():
            parts += [layer.heads.sum(-1), layer.bias]
        size = torch.stack(parts).abs().sum(0)
        return _relative((torch.stack(parts).sum(0) - self.logit).abs(), size)


def attribute_heads(
    model: PreTrainedModel, stream: StreamTrace, recording: Recording, target: Target, logits: Tensor
) -> Attribution:
    """Take the traced and recorded forward pass apart; `logits` is (T, V), of the answer rows.

    Raises UnsupportedModelError, naming the module, where the path to the logit cannot be followed exactly.
    """
    scale, softcap = logit_scale(model, stream, logits)
    assert stream.unembedding is not None
    direction = scale * token_directions(model, target)
    logit = scale * target.of_logits(stream.unembedding.outputs.to(direction))
    constant = scale * _unembedding_bias(stream, target, direction)
    final = stream.final_norm()
    last = stream.layers[max(stream.layers)].outputs
    if final is not None:
        norm = freeze(final.module, final.inputs, final.outputs)
        constant = constant + norm.constant(direction)
        direction = norm.pull_back(direction)
    if not torch.equal((stream.unembedding if final is None else final).inputs.to(last.device), last):
        raise UnsupportedModelError(
            f"{type(model).__name__}: cannot follow the residual stream from the last layer to the unembedding"
        )
    layers, embedding, others = _walk_back(model, stream, recording, direction)
    return Attribution(layers, embedding, others, constant, logit, softcap)


def _walk_back(
    model: PreTrainedModel, stream: StreamTrace, recording: Recording, direction: Tensor
) -> tuple[dict[int, LayerAttribution], Tensor, Tensor]:
    """From the last layer to the first: every layer's part, the embedding's, and that of all other blocks."""
    attention = {layer.number: layer for layer in attention_layers(model)}
    layers: dict[int, LayerAttribution] = {}
    others = torch.zeros_like(direction[:, 0])
    for number in sorted(stream.layers, reverse=True):
        trace = stream.layers[number]
        if number not in attention:
            nothing = torch.zeros_like(trace.inputs.to(direction))
            others += (check_stream_passes(number, trace, nothing, 1.0) * direction).sum(-1)
            continue
        path = attention_path(trace, attention[number], stream.projected[number])
        direction = direction * path.layer_scale
        write = path.write.to(direction)
        others += (check_stream_passes(number, trace, write, path.layer_scale) * direction).sum(-1)
        layers[number] = _attribute_layer(stream, recording, number, path, direction)
    first = stream.layers[min(stream.layers)].inputs.to(direction)
    return layers, (first * direction).sum(-1), others


def _attribute_layer(
    stream: StreamTrace, recording: Recording, number: int, path: AttentionPath, direction: Tensor
) -> LayerAttribution:
    projected = stream.projected[number]
    output = recording[number].output[0]  # (T, H, Dv)
    into_norm = direction * path.multiplier
    into_projection = into_norm if path.norm is None else path.norm.pull_back(into_norm)
    w, given = head_directions(projected.module, into_projection, output, projected.inputs)
    bias = into_projection @ bias_of(projected.module, projected.inputs.shape[-1], into_projection)
    if path.norm is not None:
        bias = bias + path.norm.constant(into_norm)
    return LayerAttribution(w, given, bias, (path.write.to(direction) * direction).sum(-1))


def logit_scale(model: PreTrainedModel, stream: StreamTrace, logits: Tensor) -> tuple[float, float | None]:
    """The factor and the softcap between the unembedding's output and the model's logits, confirmed on this pass."""
    assert stream.unembedding is not None
    config = model.config.get_text_config(decoder=True)
    factors = [1.0]
    if getattr(config, "logit_scale", None) is not None:
        factors.insert(0, float(config.logit_scale))
    if getattr(config, "logits_scaling", None) is not None:
        factors.insert(0, 1.0 / float(config.logits_scaling))
    raw = stream.unembedding.outputs.double()
    allowed = SLACK * torch.finfo(logits.dtype).eps
    for softcap in (getattr(config, "final_logit_softcapping", None), None):
        for factor in factors:
            expected = raw * factor if softcap is None else softcap * torch.tanh(raw * factor / softcap)
            if (expected - logits.to(expected)).norm() <= allowed * expected.norm():
                return factor, softcap
    raise UnsupportedModelError(
        f"{type(model).__name__} rescales the output of its {type(stream.unembedding.module).__name__} in a way that "
        "cannot be followed to the logits"
    )


def _unembedding_bias(stream: StreamTrace, target: Target, like: Tensor) -> Tensor:
    assert stream.unembedding is not None
    bias = getattr(stream.unembedding.module, "bias", None)
    return like.new_zeros(len(like)) if bias is None else target.of_logits(bias.detach().to(like))


def _relative(error: Tensor, size: Tensor) -> float:
    return float((error / size.clamp(min=torch.finfo(size.dtype).tiny)).max())


def completeness_of(attribution: Attribution) -> dict[str, Any]:
    """How far the contributions are from adding up, of the whole model and of each layer, for `meta`.

    Relative to the sum of absolute components; None instead of what is not finite, which JSON does not have.
    """
    layers = {str(number): finite(layer.residual) for number, layer in sorted(attribution.layers.items())}
    return {"overall": finite(attribution.residual), "layers": layers}


def finite(x: float | None) -> float | None:
    """None for nan and infinity."""
    return x if x is not None and math.isfinite(x) else None
