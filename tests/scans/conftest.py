"""What the tests of scans share: a small model whose heads are known, trials of it, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from locos_fast import planted
from locos_fast.prompts.trials import Trial
from tests.oracles.planted_trials import make_trials
from tests.oracles.threads import one_thread

LENGTH = 80


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> planted.PlantedModel:
    return planted.build(layers=4)


@pytest.fixture
def trials() -> list[Trial]:
    return make_trials(LENGTH, "literal", 8)
