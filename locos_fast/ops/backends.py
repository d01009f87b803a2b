"""The backends of the tensor functions: what each of them provides, and which one works on a tensor."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from locos_fast.ops import reference, torch_backend
from locos_fast.ops.arguments import require
from locos_fast.ops.attention import Attention
from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.visibility import KeyCounts

BackendName = Literal["auto", "triton", "torch", "reference"]


class Implementation(Protocol):
    """The functions of a backend, of arguments that are already checked; `spans` is a (B or 1, S, 2) int64 tensor."""

    def ov_contribution(
        self, attn: Tensor, value: Tensor, direction: Tensor, spans: Tensor, *, visible: Tensor | None = None
    ) -> Contributions: ...

    def attention_contribution(
        self, attention: Attention, direction: Tensor, spans: Tensor, counts: KeyCounts | None = None
    ) -> Contributions: ...

    def attention_summary(self, attention: Attention, spans: Tensor, counts: KeyCounts | None = None) -> Summary: ...


class Backend(NamedTuple):
    """An implementation, and how it wants to be given things."""

    name: BackendName
    functions: Implementation
    plans_on_host: bool = False  # the span table stays on the CPU, so that a launch never waits for the device
    widens: bool = False  # half-precision inputs are computed in float32

    def table(self, spans: Tensor, device: torch.device) -> Tensor:
        """The span table where the backend wants it."""
        return spans if self.plans_on_host else spans.to(device)

    def input(self, x: Tensor) -> Tensor:
        """Queries, keys, values or weights in the dtype that the backend computes in."""
        return x.to(reference.result_dtype(x)) if self.widens else x

    def inputs(self, attention: Attention) -> Attention:
        """The same of a whole attention call."""
        query, key, value = map(self.input, attention[:3])
        return attention._replace(query=query, key=key, value=value)


TORCH = Backend("torch", torch_backend)
REFERENCE = Backend("reference", reference, widens=True)


def triton_available() -> bool:
    """Whether the Triton kernels can be imported here."""
    return importlib.util.find_spec("triton") is not None


def backend_for(backend: str, tensor: Tensor) -> Backend:
    """The backend of that name for `tensor`. Raises ValueError, naming `backend`, if it cannot work on it."""
    on_gpu = tensor.device.type == "cuda"  # ROCm devices call themselves cuda too
    if backend == "auto":
        backend = "triton" if on_gpu and triton_available() and tensor.dtype != torch.float64 else "torch"
    if backend == "torch":
        return TORCH
    if backend == "reference":
        return REFERENCE
    require(backend == "triton", "backend", f"one of {', '.join(get_args(BackendName))}", repr(backend))
    require(triton_available(), "backend", "an installed Triton for 'triton'", "none")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    require(on_gpu or interpreted, "backend", "a GPU (or TRITON_INTERPRET=1) for 'triton'", f"{tensor.device}")
    require(tensor.dtype != torch.float64, "backend", "float16, bfloat16 or float32 for 'triton'", "float64")
    from locos_fast.ops import triton_backend

    return Backend("triton", triton_backend, plans_on_host=True)
