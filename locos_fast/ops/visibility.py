"""Which keys a query row may see, as two integers per row plus an optional mask for holes."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor


class Visibility(NamedTuple):
    """The keys each query row may see; slot p is visible iff ``first <= p < last`` and no hole hides it.

    Slots are indices into the sequence (0 = first column, padding included), never ``position_ids``.

    first, last: (T,) or (B, T) int64 slots.
    kv_offset: column j of key and value is slot ``kv_offset + j`` (a rolling cache starts later than slot 0).
    key_mask: (B, N) bool over the columns, True = visible; only for holes that two integers cannot say.
    """

    first: Tensor
    last: Tensor
    kv_offset: int = 0
    key_mask: Tensor | None = None

    @classmethod
    def causal(
        cls,
        q_positions: Tensor,
        *,
        kv_offset: int = 0,
        window: int | None = None,
        chunk: int | None = None,
        left_padding: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Visibility:
        """Causal visibility of the rows at slots `q_positions`, (T,) or (B, T) int64.

        window: a row sees that many slots, itself included (transformers' sliding window).
        chunk: a row sees only its own chunk; chunks are counted from the first slot that is not padding (Llama-4).
        left_padding: (B,) number of padding slots in front of each batch row.
        Raises ValueError for positions that are no int64 tensor, and for a window or a chunk of less than one slot.
        """
        if not isinstance(q_positions, Tensor) or q_positions.dtype != torch.int64 or q_positions.ndim not in (1, 2):
            raise ValueError(f"q_positions: expected a (T,) or (B, T) int64 tensor, got {q_positions!r}")
        for name, slots in (("window", window), ("chunk", chunk)):
            if slots is not None and (isinstance(slots, bool) or not isinstance(slots, Integral) or slots < 1):
                raise ValueError(f"{name}: expected a whole number of slots, at least 1, or None, got {slots!r}")
        first = torch.zeros_like(q_positions)
        if left_padding is not None:
            first = left_padding.to(q_positions)[:, None].expand(-1, q_positions.shape[-1])
        padding = first
        if chunk is not None:
            first = torch.maximum(first, padding + (q_positions - padding).div(chunk, rounding_mode="floor") * chunk)
        if window is not None:
            first = torch.maximum(first, q_positions - window + 1)
        last = (q_positions + 1).expand_as(first)
        return cls(first, last, kv_offset, key_mask)

    def to(self, device: torch.device) -> Visibility:
        """The same visibility with its tensors on `device`."""
        mask = None if self.key_mask is None else self.key_mask.to(device)
        return Visibility(self.first.to(device), self.last.to(device), self.kv_offset, mask)

    def columns(self, batch: int) -> tuple[Tensor, Tensor]:
        """First and one-past-last visible column of each row, (B, T) each; not clipped to the columns present."""
        first, last = torch.broadcast_tensors(self.first, self.last)
        shape = (batch, first.shape[-1])
        return (first - self.kv_offset).expand(shape), (last - self.kv_offset).expand(shape)

    def mask(self, batch: int, n_keys: int) -> Tensor:
        """The dense mask, (B, T, N) bool. For the reference and for tests: its size grows with the context."""
        first, last = self.columns(batch)
        column = torch.arange(n_keys, device=first.device)
        seen = (column >= first[..., None]) & (column < last[..., None])
        return seen if self.key_mask is None else seen & self.key_mask[:, None, :]


class KeyCounts(NamedTuple):
    """How many keys each row sees; one forward pass counts them once for all layers of one mask."""

    visible: Tensor  # (B, T) int64
    span_visible: Tensor  # (B, T, S) int64: inside each span


def count_keys(visibility: Visibility, spans: Tensor, batch: int, n_keys: int) -> KeyCounts:
    """The counts of rows that see `n_keys` columns at most; `spans` is (B or 1, S, 2) in slots."""
    return KeyCounts(count_visible(visibility, batch, n_keys), count_span_visible(visibility, spans, batch, n_keys))


def count_visible(visibility: Visibility, batch: int, n_keys: int) -> Tensor:
    """Number of visible keys per row, (B, T) int64."""
    everything = visibility.first.new_full((1, 1, 2), visibility.kv_offset)  # a copy from the host would wait
    everything[..., 1] += n_keys
    return count_span_visible(visibility, everything, batch, n_keys)[..., 0]


def count_span_visible(visibility: Visibility, spans: Tensor, batch: int, n_keys: int) -> Tensor:
    """Number of visible keys per row and span, (B, T, S) int64; `spans` is (B or 1, S, 2) in slots."""
    first, last = visibility.columns(batch)
    start, end = (spans - visibility.kv_offset).expand(batch, -1, -1).unbind(-1)  # (B, S)
    low = torch.maximum(first[:, :, None], start[:, None, :]).clamp(0, n_keys)
    high = torch.minimum(last[:, :, None], end[:, None, :]).clamp(0, n_keys)
    high = torch.maximum(low, high)
    if visibility.key_mask is None:
        return high - low
    before = torch.nn.functional.pad(visibility.key_mask.long().cumsum(-1), (1, 0))  # visible keys left of a column
    flat_low, flat_high = low.flatten(1), high.flatten(1)
    return (before.gather(1, flat_high) - before.gather(1, flat_low)).view_as(low)
