"""Find the attention heads with which a long-context language model retrieves an answer, by what they write.

    from locos_fast import score_tokens
    scores = score_tokens(model, input_ids, needle_span, answer_positions)
    scores.top(10)

Tensor functions are in `locos_fast.ops`, the Triton kernels in `locos_fast.kernels`, the model whose retrieval heads
are known in `locos_fast.planted`.
"""

from locos_fast._version import __version__
from locos_fast.causal.ablation import ablate
from locos_fast.causal.calibration import CalibratedMeans
from locos_fast.causal.controls import layer_matched
from locos_fast.causal.masked_checkpoint import mask_checkpoint
from locos_fast.models.architecture import UnsupportedModelError
from locos_fast.models.loading import load
from locos_fast.prompts.scan_trials import scan_trials
from locos_fast.prompts.trials import Trial
from locos_fast.scans.attempt import Method
from locos_fast.scans.run import scan
from locos_fast.scoring.attribute_tokens import attribute_tokens
from locos_fast.scoring.head_scores import HeadScores
from locos_fast.scoring.recording import record
from locos_fast.scoring.score import score_tokens
from locos_fast.scoring.scorer import LocosScorer

__all__ = [
    "CalibratedMeans",
    "HeadScores",
    "LocosScorer",
    "Method",
    "Trial",
    "UnsupportedModelError",
    "__version__",
    "ablate",
    "attribute_tokens",
    "layer_matched",
    "load",
    "mask_checkpoint",
    "record",
    "scan",
    "scan_trials",
    "score_tokens",
]
