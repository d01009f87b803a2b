"""The detectors' formulas, from one layer's recording and directions.

    L+ = sum over the needle of phi        L- = n / (K - n) * sum over the other visible keys of phi        S = L+ - L-

with phi[t, j, h] = alpha[t, j, h] * (w[t, h] . v[j, h // G]), n needle keys and K keys in all visible to row t (LOCOS,
arXiv 2607.01002). The sum over all keys, DLA, is w . head output, so the recording needs values only inside the needle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.scoring.needle import Span
from locos_fast.scoring.recording import LayerRecord


class RowScores(NamedTuple):
    """Per answer row and head, (T, H)."""

    l_plus: Tensor
    l_minus: Tensor
    dla: Tensor
    attention_spatial: Tensor
    wu: Tensor
    sees_needle: Tensor  # (T,) bool


def row_scores(kept: LayerRecord, w: Tensor, ids: Tensor, spans: list[Span], answer_ids: Tensor) -> RowScores:
    w = w.to(kept.output.device)  # (T, H, Dv)
    dla = (kept.output[0].to(w.dtype) * w).sum(-1)  # (T, H)
    l_plus = torch.einsum("htsd,thd->th", kept.span_output[0].to(w.dtype), w)
    mass, total_mass = kept.mass[0].sum(-1).mT, kept.total_mass[0].mT  # (T, H)
    needle, visible = kept.span_visible[0].sum(-1), kept.visible[0]  # (T,)
    others = visible - needle
    scale = torch.where(others > 0, needle / others.clamp(min=1), 0.0).to(w.dtype)[:, None]
    slot = kept.argmax[0].mT  # (T, H)
    in_needle = torch.stack([(slot >= start) & (slot < end) for start, end in spans]).any(0)
    ids, answer_ids = ids.to(slot.device), answer_ids.to(slot.device)
    copies = in_needle & (ids[slot.clamp(min=0)] == answer_ids[:, None])
    return RowScores(
        l_plus=l_plus,
        l_minus=scale * (dla - l_plus),
        dla=dla,
        attention_spatial=mass - scale * (total_mass - mass),
        wu=copies / sum(end - start for start, end in spans),
        sees_needle=needle > 0,
    )


def mean_over_rows(rows: RowScores) -> dict[str, Tensor]:
    seeing = rows.sees_needle
    nothing = torch.full_like(rows.dla[0], torch.nan)

    def mean(x: Tensor) -> Tensor:
        return x[seeing].mean(0) if bool(seeing.any()) else nothing

    l_plus, l_minus = mean(rows.l_plus), mean(rows.l_minus)
    return {
        "score": l_plus - l_minus,
        "l_plus": l_plus,
        "l_minus": l_minus,
        "dla": rows.dla.mean(0),
        "attention_spatial": mean(rows.attention_spatial),
        "wu": rows.wu.sum(0),
    }
