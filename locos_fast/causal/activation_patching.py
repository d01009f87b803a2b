"""cri(): how much of the answer each head alone brings back into a prompt whose needle is gone.

    CRI[l, h] = m(corrupted run with head (l, h) as in the clean run) - m(corrupted run)

the causal retrieval importance of aryopg/locos (`locos/detectors/cri.py`): the clean prompt holds the needle, in the
corrupted one other tokens stand in its place, and m is how much the model prefers the answer. A head is its slice of
what the output projection is given, behind whatever stands in between (a gate, a norm), and it is patched at all
positions. Under a causal mask both runs agree up to the needle, so what follows its beginning is all that runs again,
behind one `PrefixCache`.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from locos_fast.causal.ablation import Head
from locos_fast.models.architecture import (
    AttentionLayer,
    UnsupportedModelError,
    attention_layers,
    head_count,
    layer_count,
)
from locos_fast.models.head_map import not_handed_over
from locos_fast.models.prefix_cache import PrefixCache
from locos_fast.models.token_chunks import TOKENS_PER_CHUNK, token_chunks
from locos_fast.prompts.trials import Trial
from locos_fast.scoring.finite import CAUSES
from locos_fast.scoring.token_ids import check_token_ids

Metric = Literal["first_token_logit_diff", "answer_logprob"]
"""What is measured: the logit of the answer's first token less that of the token, other than it, that the corrupted run
prefers; or the mean log-probability of the answer's tokens, in nats."""
METRICS: tuple[Metric, ...] = get_args(Metric)


def cri(
    model: PreTrainedModel,
    trial: Trial,
    *,
    filler_id: int | None = None,
    corruption_ids: Sequence[int] | None = None,
    metric: Metric = "first_token_logit_diff",
    batch: int = 8,
    token_chunk: int | None = TOKENS_PER_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """The causal retrieval importance of every head on one trial: (layers, heads), in the metric's unit.

    filler_id: the token that takes the place of each of the needle's, of a full stop say. corruption_ids: or the tokens
    that do, as many as the needle has. One of the two is given.
    batch: heads that are patched in one forward pass, a row each. token_chunk: see `score_tokens`; it is shared between
    the rows. progress: called with the heads that are done and the heads in all.

    Layers without softmax attention, and places beyond a layer's heads, are NaN. The model runs heads / batch + 2
    times over what follows the needle's beginning; over the whole prompt if it takes no cache, if its keys depend on
    the prompt's length, or if it has linear attention or convolutions. Meanwhile memory holds what the projections are
    given in one such pass, and in each pass the keys and values of `batch` prompts. Model and hooks are put back, also
    after an exception.

    Raises ValueError for arguments that do not fit and for results that are not finite, UnsupportedModelError for
    models whose heads cannot be found, RecordingError where an output projection is not seen at work.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected at least one head, got {batch!r}")
    layers = attention_layers(model)
    rows = len(trial.answer_ids) if metric == "answer_logprob" else 1
    corruption = _corruption(model, trial, filler_id, corruption_ids)
    prompts = _prompts(trial, corruption, rows).to(model.get_input_embeddings().weight.device)
    every = [(layer.number, head) for layer in layers for head in range(head_count(layer))]
    result = np.full((layer_count(model), 1 + max(head for _, head in every)), np.nan)
    with torch.inference_mode(), token_chunks(model, token_chunk and -(-token_chunk // batch)):
        runs = _Runs.behind(model, prompts[:1, : trial.needle_span[0]], rows)
        clean, corrupted = prompts[:, runs.shared :].split(1)
        with _projection_inputs(layers) as outputs:
            runs.logits(clean)
        logits = runs.logits(corrupted)
        measure = _measure(metric, trial.answer_ids, logits)
        base = _values(measure, logits)
        for done in range(0, len(every), batch):
            heads = every[done : done + batch]
            with _patched(layers, heads, outputs):
                values = _values(measure, runs.logits(corrupted.expand(len(heads), -1)))
            result[tuple(zip(*heads, strict=True))] = values - base
            if progress is not None:
                progress(done + len(heads), len(every))
    return result


def _corruption(
    model: PreTrainedModel, trial: Trial, filler_id: int | None, corruption_ids: Sequence[int] | None
) -> list[int]:
    """The tokens in the needle's place."""
    check_token_ids(model, trial.input_ids, trial.answer_positions)
    if (filler_id is None) == (corruption_ids is None):
        given = "neither" if filler_id is None else "both"
        raise ValueError(f"corruption_ids: expected these or filler_id, got {given}")
    start, end = trial.needle_span
    name, given_ids = ("corruption_ids", corruption_ids) if filler_id is None else ("filler_id", [filler_id])
    try:
        ids = [operator.index(token) for token in given_ids or ()]
    except TypeError as error:
        raise ValueError(f"{name}: expected token ids, got {given_ids!r}") from error
    if filler_id is not None:
        ids *= end - start
    if len(ids) != end - start:
        raise ValueError(f"corruption_ids: expected {end - start} token ids, as the needle has, got {len(ids)}")
    try:
        check_token_ids(model, torch.tensor([ids]), [])
    except ValueError as error:
        raise ValueError(str(error).replace("input_ids", name, 1)) from error
    if ids == list(trial.prompt_ids[start:end]):
        raise ValueError(f"{name}: expected other tokens than the needle's, got the same")
    return ids


def _prompts(trial: Trial, corruption: list[int], rows: int) -> Tensor:
    """(2, N) the clean and the corrupted prompt, and those of the answer's tokens that predict another of `rows`."""
    start, end = trial.needle_span
    clean = [*trial.prompt_ids, *trial.answer_ids[: rows - 1]]
    return torch.tensor([clean, [*clean[:start], *corruption, *clean[end:]]])


class _Runs(NamedTuple):
    """Forward passes over what follows the tokens that two prompts begin with."""

    model: PreTrainedModel
    prefix: PrefixCache | None
    rows: int  # of the last tokens, whose logits are wanted

    @classmethod
    def behind(cls, model: PreTrainedModel, shared: Tensor, rows: int) -> _Runs:
        """shared: (1, n) token ids, computed here, once; if the model can continue from them."""
        if shared.numel():
            with contextlib.suppress(UnsupportedModelError):
                prefix = PrefixCache(model)
                prefix.extend(shared)
                if prefix.serves_several:
                    return cls(model, prefix, rows)
        return cls(model, None, rows)

    @property
    def shared(self) -> int:
        """Tokens that the passes begin behind."""
        return 0 if self.prefix is None else self.prefix.tokens

    def logits(self, ids: Tensor) -> Tensor:
        """(B, rows, vocabulary) in float32, or float64 of a float64 model; (B, n) ids follow the shared tokens."""
        may_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        keep = {"logits_to_keep": self.rows} if may_keep else {}
        if self.prefix is None:
            logits = self.model(input_ids=ids, use_cache=False, **keep).logits
        else:
            with self.prefix.branches(len(ids)):
                logits = self.model(input_ids=ids, **self.prefix.forward_arguments(), **keep).logits
        logits = logits[:, -self.rows :]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _measure(metric: str, answer_ids: list[int], corrupted: Tensor) -> Callable[[Tensor], Tensor]:
    """The metric, (B, T, V) logits -> (B,); corrupted: (1, T, V) those of the corrupted run."""
    if metric == "answer_logprob":
        answer = torch.tensor(answer_ids, device=corrupted.device)[None, :, None]
        return lambda logits: logits.log_softmax(-1).gather(-1, answer.expand(len(logits), -1, -1))[..., 0].mean(-1)
    gold = answer_ids[0]
    others = corrupted[0, -1].clone()
    others[gold] = -torch.inf
    foil = int(others.argmax())
    return lambda logits: logits[:, -1, gold] - logits[:, -1, foil]


def _values(measure: Callable[[Tensor], Tensor], logits: Tensor) -> NDArray[np.float64]:
    values = measure(logits).double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"model: how much it prefers the answer is not finite {CAUSES}")
    return values


@contextlib.contextmanager
def _projection_inputs(layers: Sequence[AttentionLayer]) -> Iterator[dict[int, Tensor]]:
    """Layer -> (n, heads, Dv) what its output projection is given by a pass over one prompt inside the context: n
    tokens, or fewer where a model leaves out those that nothing reads (Gemma-4)."""
    seen: dict[int, Tensor] = {}

    def keep(layer: AttentionLayer) -> Callable:
        def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            _, given = _given(args, kwargs)
            heads, width = head_count(layer), given.shape[-1]
            if layer.number in seen or width % heads:
                raise not_handed_over(layer)
            seen[layer.number] = given.reshape(-1, heads, width // heads)

        return pre_hook

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.projection.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        yield seen
    for layer in layers:
        if layer.number not in seen:
            raise not_handed_over(layer)


@contextlib.contextmanager
def _patched(layers: Sequence[AttentionLayer], heads: Sequence[Head], outputs: dict[int, Tensor]) -> Iterator[None]:
    """Inside the context, row i of a pass has the head heads[i] as in `outputs`, and all others of its own."""

    def patch(layer: AttentionLayer, places: list[tuple[int, int]]) -> Callable:
        output = outputs[layer.number]

        def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            name, given = _given(args, kwargs)
            changed = given.clone(memory_format=torch.contiguous_format)
            of_rows = changed.view(len(heads), *output.shape)
            for row, head in places:
                of_rows[row, :, head] = output[:, head]
            return ((changed, *args[1:]), kwargs) if name is None else (args, kwargs | {name: changed})

        return pre_hook

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            places = [(row, head) for row, (number, head) in enumerate(heads) if number == layer.number]
            if places:
                hook = layer.projection.register_forward_pre_hook(patch(layer, places), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


def _given(args: tuple, kwargs: dict) -> tuple[str | None, Tensor]:
    """What a projection is called with, and by what name, if by one."""
    if args:
        return None, args[0]
    return next((name, x) for name, x in kwargs.items() if isinstance(x, Tensor))
