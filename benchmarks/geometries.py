"""The attention shapes that are timed, and the cases (shape x context x answer rows x dtype) of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """One attention layer of a published model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None


QWEN3_8B = Geometry("Qwen3-8B", 32, 8, 128)
GEOMETRIES = (
    QWEN3_8B,
    Geometry("Llama-3.1-8B", 32, 8, 128),
    Geometry("Qwen3-32B", 64, 8, 128),
    Geometry("Gemma-3-27B", 32, 16, 128, window=1024),
    Geometry("gpt-oss-20b", 64, 8, 64),
)

NEEDLE = 32  # tokens


class Case(NamedTuple):
    """One layer at one context length: `rows` answer steps at the end of `n_keys` tokens."""

    geometry: Geometry
    n_keys: int
    rows: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.geometry.name} N={self.n_keys} T={self.rows} {self.dtype_name}"

    @property
    def config(self) -> dict[str, int | str | None]:
        """The case as it is written to the results file."""
        return {
            "geometry": self.geometry.name,
            "heads": self.geometry.heads,
            "kv_heads": self.geometry.kv_heads,
            "head_dim": self.geometry.head_dim,
            "window": self.geometry.window,
            "needle": NEEDLE,
            "n_keys": self.n_keys,
            "rows": self.rows,
            "dtype": self.dtype_name,
        }

    @classmethod
    def from_config(cls, config: dict) -> Case:
        """The case that `config` describes."""
        geometry = Geometry(config["geometry"], *(config[name] for name in Geometry._fields[1:]))
        return cls(geometry, config["n_keys"], config["rows"], getattr(torch, config["dtype"]))

    @property
    def rows_per_kv_head(self) -> int:
        """Answer steps times query heads of one key/value head: what one program of a kernel works on."""
        return self.rows * self.geometry.heads // self.geometry.kv_heads

    @property
    def first_row(self) -> int:
        """Slot of the first answer row; the rows are the last slots of the context."""
        return self.n_keys - self.rows

    @property
    def first_key(self) -> int:
        """First column that some row sees."""
        window = self.geometry.window
        return 0 if window is None else max(0, self.first_row - window + 1)

    @property
    def keys_seen(self) -> int:
        """Columns that some row sees: what any implementation has to read."""
        return self.n_keys - self.first_key

    @property
    def needle(self) -> tuple[int, int]:
        """In the middle of what every row sees."""
        window = self.geometry.window
        first = 0 if window is None else max(0, self.n_keys - window)
        middle = (first + self.first_row) // 2
        return middle - NEEDLE // 2, middle + NEEDLE // 2


class Planned(NamedTuple):
    """A case, and whether only locos_fast runs it (to show what does not depend on it) or every provider."""

    case: Case
    ours_only: bool = False


SHORT, MIDDLE, LONG = 8192, 32_768, 102_400  # tokens, on a CPU
CONTEXTS = (4096, 8192, 32_768, 102_400, 262_144, 524_288)  # tokens, on a GPU
ROWS = (1, 8, 32, 64)
USUAL_ROWS, USUAL_CONTEXT = 8, 102_400


def plan(
    device: str, *, quick: bool, geometries: Collection[str] | None = None, contexts: Collection[int] | None = None
) -> list[Planned]:
    """The cases of a run on "cpu" or "cuda"; only those of some geometries, by name, or context lengths, if given."""
    planned = _plan_cpu(quick) if device == "cpu" else _plan_cuda(quick)
    return [
        Planned(case, ours_only)
        for case, ours_only in planned
        if (not geometries or case.geometry.name in geometries) and (not contexts or case.n_keys in contexts)
    ]


def _plan_cuda(quick: bool) -> list[Planned]:
    """Every context at the usual rows and every number of rows at the usual context; of the rest, ours only."""
    if quick:
        return [Planned(Case(QWEN3_8B, n_keys, USUAL_ROWS, torch.bfloat16)) for n_keys in (8192, USUAL_CONTEXT)]
    return [
        Planned(Case(geometry, n_keys, rows, torch.bfloat16), ours_only=rows != USUAL_ROWS and n_keys != USUAL_CONTEXT)
        for geometry in GEOMETRIES
        for n_keys in CONTEXTS
        for rows in ROWS
    ]


def _plan_cpu(quick: bool) -> list[Planned]:
    dtypes = (torch.float32, torch.bfloat16)
    planned = [
        Planned(Case(QWEN3_8B, n_keys, USUAL_ROWS, dtype), ours_only=n_keys == SHORT)
        for dtype in dtypes
        for n_keys in (LONG, MIDDLE, SHORT)
    ]
    if quick:
        return planned
    others = [Case(geometry, MIDDLE, USUAL_ROWS, dtype) for geometry in GEOMETRIES[1:] for dtype in dtypes]
    longer = [Case(QWEN3_8B, 2 * LONG, USUAL_ROWS, torch.bfloat16)]
    return planned + [Planned(case) for case in others] + [Planned(case, ours_only=True) for case in longer]
