"""What heads are scored toward in one forward pass: the answer, in either unit, through a lens, and a foil."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.residual_stream import StreamTrace
from locos_fast.scoring.directions import Target, head_directions, token_directions
from locos_fast.scoring.logit_units import attribute_heads, completeness_of
from locos_fast.scoring.prompt_parts import Rows
from locos_fast.scoring.recording import Recording
from locos_fast.scoring.tuned_lens import TunedLens


class Observed(NamedTuple):
    """A forward pass that was recorded and traced, at the answer rows."""

    model: PreTrainedModel
    stream: StreamTrace
    recording: Recording
    logits: Tensor  # (T, V)


class Directions(NamedTuple):
    """By target and layer: "answer" and "foil" in the norm asked for, "answer-frozen" in logits, "answer-lens".

    toward   w (T, H, Dv), whose dot product with a head's output is what the head writes toward the target
    offsets  (T,), what a lens adds per unit of attention
    meta     how exact those in logits are, or why there are none
    """

    toward: dict[str, dict[int, Tensor]]
    offsets: dict[str, dict[int, Tensor]]
    meta: dict[str, Any]

    def of_rows(self, rows: slice) -> Directions:
        """For some of the rows."""
        chosen = [
            {target: {number: x[rows] for number, x in layers.items()} for target, layers in by_target.items()}
            for by_target in (self.toward, self.offsets)
        ]
        return Directions(chosen[0], chosen[1], self.meta)

    def has(self, *, with_parts: bool) -> set[str]:
        """The needs of detectors that these meet."""
        needs = {"answer-frozen": "frozen", "answer-lens": "lens"}
        return {need for target, need in needs.items() if with_parts and target in self.toward}

    def of_layer(self, number: int, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One layer's directions and offsets; the foil's for the rows in which it differs from the answer."""
        toward = {target: layers[number] for target, layers in self.toward.items()}
        if "foil" in toward:
            toward["foil"] = toward["foil"][rows.foil_steps]
        return toward, {target: layers[number] for target, layers in self.offsets.items()}


def directions_toward(
    observed: Observed, targets: Mapping[str, Target], norm: str, *, frozen_too: bool, lens: TunedLens | None
) -> Directions:
    """frozen_too: add "answer-frozen" where the model's logit can be followed. lens: add "answer-lens"."""
    found = Directions({}, {}, {})
    for name, target in targets.items():
        if norm == "none":
            found.toward[name], _ = _raw(observed, target, None)
            continue
        found.toward[name], meta = _frozen(observed, target)
        found.meta.update(meta if name == "answer" else {})
    if frozen_too:
        try:
            found.toward["answer-frozen"], meta = _frozen(observed, targets["answer"])
            found.meta["frozen_completeness"] = meta["completeness"]
        except UnsupportedModelError as error:
            found.meta["frozen_unavailable"] = str(error)
    if lens is not None:
        found.toward["answer-lens"], found.offsets["answer-lens"] = _raw(observed, targets["answer"], lens)
    return found


def _frozen(observed: Observed, target: Target) -> tuple[dict[int, Tensor], dict[str, Any]]:
    attribution = attribute_heads(observed.model, observed.stream, observed.recording, target, observed.logits)
    meta = {"completeness": completeness_of(attribution), "final_logit_softcap": attribution.softcap}
    return {number: layer.directions for number, layer in attribution.layers.items()}, meta


def _raw(observed: Observed, target: Target, lens: TunedLens | None) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Along the raw unembedding rows, if need be through the lens of each layer; and what the lens adds."""
    rows = token_directions(observed.model, target)
    directions, offsets = {}, {}
    for number, kept in observed.recording.items():
        projected = observed.stream.projected[number]
        direction = rows if lens is None else lens.direction(number, rows)
        directions[number], _ = head_directions(projected.module, direction, kept.output[0], projected.inputs)
        if lens is not None:
            offsets[number] = lens.bias(number, rows)
    return directions, offsets
