"""Some of the GPU tests, on the CPU: so that the first minute on a GPU is not the first of the tests themselves."""

import pytest

from tests.kernels.test_kernels_gpu import (  # noqa: F401
    test_every_number_of_rows_is_within_the_error_bound,
    test_half_precision_directions_lose_nothing,
    test_the_torch_backend_is_within_the_error_bound_too,
)

# the interpreter computes both sides of tl.where, NumPy warns of the one that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
