"""Every detector: what it needs of a forward pass, its formula, where that comes from, its name in files.

    phi[t, j, h] = alpha[t, j, h] * (w[t, h] . v[j, h // G])        what head h writes toward the answer from key j
    L+ = sum over the needle of phi        L- = n / (K - n) * sum over the other visible keys of phi

with n needle keys and K keys in all visible to row t (LOCOS, arXiv 2607.01002). The sum over all keys, DLA, is
w . head output, so a recording needs values only inside the needle. To add a detector, add an entry to `DETECTORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from locos_fast.scoring.needle import Span
from locos_fast.scoring.prompt_parts import Places, Rows
from locos_fast.scoring.recording import LayerRecord


class Sums(NamedTuple):
    """Sums of phi per answer row and head, (T, H)."""

    l_plus: Tensor
    l_minus: Tensor
    total: Tensor

    @property
    def score(self) -> Tensor:
        return self.l_plus - self.l_minus


class LayerEvidence:
    """What one attention layer left for the rows that are read, and what its heads are scored toward.

    kept: the recorded rows. directions: target -> w (T, H, Dv), for the answer rows; the targets are "answer", in the
    norm asked for, "answer-frozen", in logits, and "foil", in the norm asked for, for `rows.foil`.
    "answer-lens" is the answer through a tuned lens, whose `offsets` (T,) are what it adds per unit of attention.
    ids: (N,) the prompt's tokens. answer_ids: (T,).
    """

    def __init__(
        self,
        kept: LayerRecord,
        rows: Rows,
        directions: Mapping[str, Tensor],
        ids: Tensor,
        spans: list[Span],
        answer_ids: Tensor,
        offsets: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.kept, self.rows, self.directions, self.spans = kept, rows, directions, spans
        self.ids, self.answer_ids = ids.to(kept.output.device), answer_ids.to(kept.output.device)
        self.mass, self.total_mass = kept.mass[0].sum(-1).mT, kept.total_mass[0].mT  # (R, H)
        self.needle, self.visible = kept.span_visible[0].sum(-1), kept.visible[0]  # (R,) keys
        self.offsets = offsets or {}
        self._sums: dict[str, Sums] = {}

    def sums(self, toward: str = "answer") -> Sums:
        """Toward a target, of the answer rows, or of those of the foil."""
        if toward not in self._sums:
            rows = self.rows.foil if toward == "foil" else self.rows.answer
            w = self.directions[toward].to(self.kept.output.device)
            total = (self.kept.output[0][rows].to(w.dtype) * w).sum(-1)  # (T, H)
            l_plus = torch.einsum("htsd,thd->th", self.kept.span_output[0][:, rows].to(w.dtype), w)
            if toward in self.offsets:
                offset = self.offsets[toward].to(w)[:, None]
                l_plus, total = l_plus + self.mass[rows] * offset, total + self.total_mass[rows] * offset
            self._sums[toward] = Sums(l_plus, self.scale(rows, w.dtype) * (total - l_plus), total)
        return self._sums[toward]

    def scale(self, rows: Places, dtype: torch.dtype) -> Tensor:
        """(rows, 1): n / (K - n); 0 where the needle is all that a row sees."""
        needle, others = self.needle[rows], self.visible[rows] - self.needle[rows]
        return torch.where(others > 0, needle / others.clamp(min=1), 0.0).to(dtype)[:, None]

    def mean(self, per_row: Tensor, rows: Places) -> Tensor:
        """(H,) mean of (rows, H) over the rows that see at least one needle key, NaN without any."""
        seeing = self.needle[rows] > 0
        return per_row[seeing].mean(0) if bool(seeing.any()) else torch.full_like(per_row[0], torch.nan)

    def needle_mass(self, rows: Places) -> Tensor:
        """(rows, H) attention on the needle; NaN throughout if none of the rows sees any of it."""
        seen = (self.needle[rows] > 0).any()
        return torch.where(seen, self.mass[rows], torch.nan)

    def in_needle(self, rows: Places) -> Tensor:
        """(rows, H) bool: whether the most attended key is the needle's."""
        slot = self.kept.argmax[0].mT[rows]
        return torch.stack([(slot >= start) & (slot < end) for start, end in self.spans]).any(0)


class Detector(NamedTuple):
    """One way to score a head."""

    name: str  # of its array, in files and in `HeadScores`
    label: str  # for people
    formula: str
    source: str
    compute: Callable[[LayerEvidence], Tensor]  # -> (H,)
    needs: tuple[str, ...] = ()  # beyond the answer rows: "prompt", "question", "foil", "frozen", "lens"


def _locos(toward: str) -> Callable[[LayerEvidence], Tensor]:
    return lambda e: e.mean(e.sums(toward).l_plus, e.rows.answer) - e.mean(e.sums(toward).l_minus, e.rows.answer)


def _attention_spatial(e: LayerEvidence) -> Tensor:
    rows = e.rows.answer
    mass = e.mass[rows]
    return e.mean(mass - e.scale(rows, mass.dtype) * (e.total_mass[rows] - mass), rows)


def _wu(e: LayerEvidence) -> Tensor:
    slot = e.kept.argmax[0].mT[e.rows.answer]
    copies = e.in_needle(e.rows.answer) & (e.ids[slot.clamp(min=0)] == e.answer_ids[:, None])
    return (copies / sum(end - start for start, end in e.spans)).sum(0)


def _foil(e: LayerEvidence) -> Tensor:
    return e.mean(e.sums().score[e.rows.foil_steps] - e.sums("foil").score, e.rows.foil)


def _contrastive(e: LayerEvidence) -> Tensor:
    of_answer = e.mean(e.mass[e.rows.answer], e.rows.answer)
    if e.rows.reply == []:
        return of_answer
    return (of_answer - e.mass[e.rows.reply].mean(0)).clamp(min=0)


LOCOS_PAPER, LOCOS_CODE = "arXiv 2607.01002", "arXiv 2607.01002, public code"
SPATIAL = "the LOCOS contrast on attention: sum over the needle of alpha - n / (K - n) * sum over the rest"

DETECTORS: tuple[Detector, ...] = (
    Detector("score", "LOCOS", "L+ - L-", LOCOS_PAPER, _locos("answer")),
    Detector(
        "l_plus",
        "LOCOS L+",
        "sum over the needle of phi",
        LOCOS_PAPER,
        lambda e: e.mean(e.sums().l_plus, e.rows.answer),
    ),
    Detector(
        "l_minus",
        "LOCOS L-",
        "n / (K - n) * sum over the other keys of phi",
        LOCOS_PAPER,
        lambda e: e.mean(e.sums().l_minus, e.rows.answer),
    ),
    Detector(
        "dla",
        "DLA",
        "sum over all keys of phi = w . head output, mean over all answer rows",
        "direct logit attribution, arXiv 2211.00593",
        lambda e: e.sums().total.mean(0),
    ),
    Detector("attention_spatial", "attention-spatial", SPATIAL, LOCOS_CODE, _attention_spatial),
    Detector(
        "wu",
        "Wu copy score",
        "1 / needle tokens for each answer token whose most attended key is in the needle and is that token",
        "arXiv 2404.15574",
        _wu,
    ),
    Detector(
        "locos_frozen",
        "LOCOS frozen",
        "L+ - L- in logits: norms and multipliers on the way folded in, with their scales in this pass",
        LOCOS_PAPER,
        _locos("answer-frozen"),
        ("prompt", "frozen"),
    ),
    Detector(
        "dla_frozen",
        "DLA frozen",
        "DLA in logits",
        "direct logit attribution, arXiv 2211.00593",
        lambda e: e.sums("answer-frozen").total.mean(0),
        ("prompt", "frozen"),
    ),
    Detector(
        "locos_foil",
        "LOCOS against a foil",
        "LOCOS toward the answer less toward a wrong one of the same type, over the tokens in which they differ",
        "this project",
        _foil,
        ("foil",),
    ),
    Detector(
        "locos_wrong",
        "LOCOS toward the foil",
        "L+ - L- toward a wrong answer of the same type, over the tokens in which it differs from the right one",
        "this project",
        lambda e: e.mean(e.sums("foil").score, e.rows.foil),
        ("foil",),
    ),
    Detector(
        "dla_foil",
        "DLA against a foil",
        "DLA toward the answer less toward a wrong one of the same type, over the tokens in which they differ",
        "this project",
        lambda e: (e.sums().total[e.rows.foil_steps] - e.sums("foil").total).mean(0),
        ("foil",),
    ),
    Detector(
        "locos_tuned_lens",
        "LOCOS tuned lens",
        "L+ - L- with the answer's direction taken back through the tuned lens of the layer",
        LOCOS_CODE,
        _locos("answer-lens"),
        ("prompt", "lens"),
    ),
    Detector(
        "needle_hit",
        "needle hit",
        "1 if the most attended key of the prompt's last token is in the needle",
        "arXiv 2606.21249",
        lambda e: e.mean(e.in_needle(e.rows.last).to(e.mass.dtype), e.rows.last),
        ("prompt",),
    ),
    Detector(
        "qrhead",
        "QRHead",
        "attention of the question's tokens on the needle, mean over them",
        "arXiv 2506.09944",
        lambda e: e.needle_mass(e.rows.question).mean(0),
        ("question",),
    ),
    Detector(
        "headkv",
        "HeadKV anchors",
        "attention on the needle of the prompt's last 8 tokens, the largest of them",
        "arXiv 2410.19258",
        lambda e: e.needle_mass(e.rows.anchors).amax(0),
        ("prompt",),
    ),
    Detector(
        "contrastive",
        "contrastive",
        "attention on the needle, mean over the answer's rows less mean over the reply's others, at least 0",
        LOCOS_CODE,
        _contrastive,
        ("prompt",),
    ),
)
# by activation patching, in passes of its own: see `causal.activation_patching`
CRI, CRI_SOURCE = "cri", LOCOS_CODE
CRI_FORMULA = (
    "the answer's first logit less the best other one, in the prompt with the needle replaced: with the head's "
    "output of the whole prompt patched in, less without"
)
LABELS = {detector.name: detector.label for detector in DETECTORS} | {CRI: "CRI"}


def detectors_for(has: Iterable[str]) -> tuple[Detector, ...]:
    """Those whose needs are met: `has` holds what of "prompt", "question", "foil", "frozen" and "lens" is there."""
    there = set(has)
    return tuple(detector for detector in DETECTORS if there.issuperset(detector.needs))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of arrays in the order of `DETECTORS`, and any others behind them."""
    place = {name: i for i, name in enumerate(LABELS)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))
