"""Results that are no numbers are refused: NaN sorts last, counts as nothing in sums, and would pass for a result."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CAUSES = "(NaN or infinite weights, or overflow: try another dtype)"


def check_layer(number: int, values: NDArray) -> None:
    """Raises ValueError, naming the layer, if something that its heads wrote is NaN or infinite."""
    if not np.isfinite(values).all():
        raise ValueError(f"layer {number}: what its heads write is not finite {CAUSES}")
