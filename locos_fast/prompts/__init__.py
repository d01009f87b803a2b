"""What is asked of a model: trials, prompts composed in token space, texts cut into segments."""

from locos_fast.prompts.compose import compose
from locos_fast.prompts.trials import Trial

__all__ = ["Trial", "compose"]
