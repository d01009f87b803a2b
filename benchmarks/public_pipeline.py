"""The public LOCOS code (github.com/aryopg/locos), imported from where the user put it and called as it stands.

Nothing of it is part of this repository. It generates the answer token by token with a cache and eager attention, and
sums the contributions of every step on the way; it prefills with sdpa, its default.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

ADDRESS = "https://github.com/aryopg/locos"
HOW = f"git clone {ADDRESS} DIR, then --public DIR or LOCOS_PUBLIC=DIR"
ENTRY = "locos.detectors.logit_contrib"
PREFILL = "sdpa"
MOST_STEPS = 50  # its default
NO_TOKEN = -1  # no newline token: only the end-of-sequence token stops it


class Unavailable(Exception):
    """Why the public code cannot be called."""


class PublicScores(NamedTuple):
    """(layers, heads) each, means over the answer steps, and what was generated."""

    score: np.ndarray
    l_plus: np.ndarray
    l_minus: np.ndarray
    answer_steps: int
    generated: str


class PublicPipeline:
    """The public code in a folder; raises Unavailable, with the reason, where it cannot be imported."""

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise Unavailable(f"not given: {HOW}")
        if not (folder / ENTRY.replace(".", "/")).with_suffix(".py").is_file():
            raise Unavailable(f"{folder.name} is no clone of {ADDRESS}: {HOW}")
        self.commit = commit_of(folder)
        self._detector = _import(folder.resolve(), ENTRY)
        self._models = importlib.import_module("locos.utils.model_utils")

    def scorer(self, model: PreTrainedModel, tokenizer: Any) -> PublicScorer:
        """What scores trials on one model; the weights it needs are taken out here, once."""
        return PublicScorer(self._detector, self._models, model, tokenizer)


class PublicScorer:
    def __init__(self, detector: ModuleType, models: ModuleType, model: PreTrainedModel, tokenizer: Any) -> None:
        self.detector, self.model, self.tokenizer = detector, model, tokenizer
        self.layers, heads, self.kv_heads, self.head_dim = detector.extract_head_config(model)
        self.projections, self.heads = detector.get_o_proj_weights(model, self.layers, heads, self.head_dim)
        self.unembedding = detector.get_unembedding_matrix(model)
        self.stop = models.get_stop_token_ids(tokenizer, model)

    def score(
        self, prompt_ids: torch.Tensor, needle: tuple[int, int], answer: str, *, steps: int = MOST_STEPS
    ) -> PublicScores:
        """Generate at most `steps` tokens after the prompt (1, N), and score those that are the answer."""
        implementation = self.model.config._attn_implementation
        try:
            found = self.detector.detect_single_trial_logit_contrib(
                self.model,
                self.tokenizer,
                prompt_ids,
                *needle,
                self.layers,
                self.heads,
                self.kv_heads,
                self.head_dim,
                answer,
                PREFILL,
                o_proj_weights=self.projections,
                W_U=self.unembedding,
                max_decode_steps=steps,
                newline_token_id=NO_TOKEN,
                stop_token_ids=self.stop,
            )
        finally:
            self.model.config._attn_implementation = implementation  # it leaves eager behind
        return PublicScores(found.S_tau, found.L_plus, found.L_minus, found.num_answer_steps, found.generated_text)


def commit_of(folder: Path) -> str:
    """Hash of the commit that is checked out, "+" appended if there are changes; "unknown" if it is no clone."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != folder.resolve():
            return "unknown"
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return "unknown"


def _import(folder: Path, name: str) -> ModuleType:
    """Import from the folder; the import path is put back, as the module lengthens it itself."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    stand_in = _stand_in_for_rouge()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        for half_imported in set(sys.modules) - modules - set(stand_in):
            if half_imported.partition(".")[0] == "locos":
                del sys.modules[half_imported]
        raise Unavailable(f"its import fails: {error}") from error
    finally:
        sys.path[:] = path
        for missing in stand_in:
            del sys.modules[missing]
    if not Path(str(module.__file__)).is_relative_to(folder):
        raise Unavailable(f"another package named locos was imported before it, from {module.__file__}")
    return module


def _stand_in_for_rouge() -> list[str]:
    """Where rouge_score is missing, an empty module of its name: it judges generated texts, and scores no head."""
    if importlib.util.find_spec("rouge_score"):
        return []
    stand_in = ModuleType("rouge_score")
    stand_in.rouge_scorer = SimpleNamespace(RougeScorer=lambda *_, **__: None)  # type: ignore[attr-defined]
    sys.modules["rouge_score"] = stand_in
    return ["rouge_score"]
