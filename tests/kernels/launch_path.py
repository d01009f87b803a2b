"""The whole way of a launch but the GPU: Triton's own JIT compiles for an H100, under a driver that runs nothing.

    python tests/kernels/launch_path.py      # a process of its own: the driver stands for all of Triton

Nothing else without a GPU meets the keys by which Triton decides that a kernel is compiled anew: whether an integer is
1 or a multiple of 16, whether a pointer is aligned. Prints, as JSON, for every kernel what was compiled and launched in
an ordinary day: contexts x answer lengths x numbers of spans, by `attention_contribution` and `attention_summary`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from locos_fast import ops
from locos_fast.ops import Visibility, functions, triton_backend, triton_grid, triton_partials
from locos_fast.ops.backends import Backend
from locos_fast.ops.visibility import count_keys

CONTEXTS = (8192, 10_001, 16_384, 32_768, 50_000, 65_536, 102_400, 131_072)  # keys
ANSWERS = (1, 4, 8, 16)  # steps
SPANS = (1, 100, 1000)
HEADS, KV_HEADS, DIM = 32, 8, 128

launched: dict[int, list[tuple[int, ...]]] = {}  # grids, by the handle of the compiled kernel


class Utils:
    """What Triton asks of a GPU."""

    def __init__(self) -> None:
        self.loaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills, threads."""
        self.loaded += 1
        return self.loaded, self.loaded, 32, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


class Launcher:
    """Notes a launch instead of making it."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        launched.setdefault(function, []).append((x, y, z))


class Driver:
    """An H100 that runs nothing; tensors lie on the CPU."""

    binary_ext = "cubin"
    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utils()

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return "int"


def calls() -> Iterator[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]:
    """The arguments of every call of the day; keys and values are memory that nobody touches."""
    for n_keys, steps, n_spans in product(CONTEXTS, ANSWERS, SPANS):
        query = torch.empty(1, HEADS, steps, DIM, dtype=torch.bfloat16)
        key, value = (torch.empty(1, KV_HEADS, n_keys, DIM, dtype=torch.bfloat16) for _ in range(2))
        direction = torch.empty(1, HEADS, steps, DIM)
        size = n_keys // n_spans if n_spans > 1 else 32
        spans = torch.tensor([[(i * size, (i + 1) * size) for i in range(n_spans)]])
        visibility = Visibility.causal(torch.arange(n_keys - steps, n_keys))
        counts = count_keys(visibility, spans, 1, n_keys)
        yield (query, key, value, direction, spans, visibility), {"counts": counts, "backend": "triton"}


def compiled() -> dict[str, list[dict[str, Any]]]:
    """Of each kernel the variants: launch options, and the grids it was launched with."""
    kernels = [
        x for module in (triton_backend, triton_partials) for x in vars(module).values() if hasattr(x, "arg_names")
    ]
    found = {}
    for kernel in kernels:
        variants = kernel.device_caches[0][0].values()
        found[kernel.__name__] = [
            {
                "fused": variant.metadata.enable_fp_fusion,
                "registers": variant.metadata.maxnreg,
                "grids": launched[variant.function],
            }
            for variant in variants
        ]
    return found


def main() -> None:
    driver.set_active(Driver())
    triton_grid.architecture = lambda device: "sm_90"
    functions.backend_for = lambda backend, tensor: Backend("triton", triton_backend, plans_on_host=True)
    for (query, key, value, direction, *where), options in calls():
        ops.attention_contribution(query, key, value, direction, *where, **options)
        ops.attention_summary(query, key, value, *where, **options)
    print(json.dumps(compiled()))


if __name__ == "__main__":
    main()
