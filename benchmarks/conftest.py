"""Options of `pytest benchmarks --benchmark-only`."""

import pytest
import torch

from benchmarks.geometries import GEOMETRIES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("locos_fast benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=default, help="where to time")
    group.addoption("--quick", action="store_true", help="one geometry")
    group.addoption("--geometry", action="append", choices=[geometry.name for geometry in GEOMETRIES], help="only this")
    group.addoption("--context", action="append", type=int, help="only this number of keys")
