"""Tensors: what heads write from spans of keys, by Triton kernels, by blockwise PyTorch and by the plain definition."""

from locos_fast.ops.contributions import Contributions, Summary
from locos_fast.ops.functions import (
    Spans,
    attention_contribution,
    attention_summary,
    ov_contribution,
    position_contribution,
)
from locos_fast.ops.visibility import Visibility

__all__ = [
    "Contributions",
    "Spans",
    "Summary",
    "Visibility",
    "attention_contribution",
    "attention_summary",
    "ov_contribution",
    "position_contribution",
]
