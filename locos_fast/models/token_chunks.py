"""Run what treats every token on its own a few thousand tokens at a time, so that its intermediates stay small.

At 100,000 tokens the widest moment of a forward pass is not attention but an MLP, and the norms that work in float32
inside. Both act on each token alone: taken in chunks along the tokens, and written into one output, they need the
intermediates of one chunk only.

Nothing is known by model name. Modules that hold attention, a convolution or a recurrence are never touched; any other
module is first shown random tokens, whole and in chunks, in the very form in which the model calls it, and is chunked
only if both give the same every time. What some sixty tokens cannot show is a limit that only more of them reach, such
as experts with room for a fixed, larger number of tokens that drop the rest. Only `forward` of the module itself is
wrapped, so its hooks see whole inputs and outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from locos_fast.models.architecture import decoder
from locos_fast.models.forward_inputs import read_forward

TOKENS_PER_CHUNK = 8192

PROBE_TOKENS = 63
PROBE_CHUNK = 16  # four chunks, the last one shorter
SPREADS = (1.0, 1.0, 0.1)  # of random tokens; the last are all alike, so that a router sends them to the same expert
SLACK = 16  # rounding errors of the coarsest dtype at work, relative to the norm of a token's output
CHOICES = ("topk", "sort", "argsort", "argmax", "max", "kthvalue")  # operators with which a router chooses

# module -> form of call -> verdict: a model is shown to be token-wise once, not in every forward pass
_shown: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()

_PLAIN = (Tensor, bool, int, float, str, type(None))


@contextlib.contextmanager
def token_chunks(model: PreTrainedModel, size: int | None = TOKENS_PER_CHUNK) -> Iterator[set[str]]:
    """Inside the context, run the decoder's token-wise modules in chunks of `size` tokens.

        with torch.inference_mode(), token_chunks(model) as chunked:
            model(input_ids, use_cache=False, logits_to_keep=1)
        chunked  # {"layers.0.input_layernorm", "layers.0.mlp", "layers.0.self_attn.q_norm", ..., "norm"}

    Yields the names, in the decoder, of the modules that were chunked; the set fills as the model runs. With None,
    with at most `size` tokens, in training mode and where gradients are recorded, the forward pass is left as it is.
    Results differ from those of the whole by rounding only, as the matrix products have other shapes. Every module is
    put back on exit, also after an exception. Raises ValueError for a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"size: expected at least one token, or None, got {size}")
    chunks = _Chunks(size or 0)
    if size is None:
        yield chunks.names
        return
    stack = decoder(model)
    with contextlib.ExitStack() as put_back:
        put_back.callback(stack.register_forward_pre_hook(chunks.before_forward, with_kwargs=True).remove)
        found = [(name, module) for name, module in stack.named_modules() if name and _may_be_chunked(module)]
        for name, module, code in [(name, module, _code(module)) for name, module in found]:
            put_back.enter_context(_forward_replaced(module, chunks.wrapped(name, module, code)))
        yield chunks.names


class TokenCall(NamedTuple):
    """A call of one module, whose tensors carry the same tokens along one axis."""

    args: tuple
    kwargs: dict[str, Any]
    axis: int  # 1, or 0 where the module is given a flat list of tokens
    length: int  # of that axis

    @property
    def hidden(self) -> Tensor:
        """What the module works on: the first tensor that it is given."""
        return next(x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))

    @property
    def form(self) -> tuple:
        """What calls have in common that differ in their tokens only."""
        named = [*enumerate(self.args), *sorted(self.kwargs.items())]
        kinds = (((x.dtype, x.ndim, x.device) if isinstance(x, Tensor) else (x,)) for _, x in named)
        return (self.axis, *((name, *kind) for (name, _), kind in zip(named, kinds, strict=True)))

    def part(self, start: int, stop: int) -> TokenCall:
        """The same call on a run of tokens. Tensors without the token axis are given to every part."""
        # contiguous, as the whole is, for modules that take a view; of one sequence nothing is copied
        return self._on_tokens(lambda x: x.narrow(self.axis, start, stop - start).contiguous(), stop - start)

    def at_random(self, seed: int, spread: float = 1.0) -> TokenCall:
        """The same call on a few random tokens, `spread` apart; what is no number, as an expert's index, is taken from
        this call."""
        generator, count = torch.Generator().manual_seed(seed), min(PROBE_TOKENS, self.length)

        def draw(x: Tensor) -> Tensor:
            few = x.narrow(self.axis, 0, count).contiguous()
            if not x.is_floating_point():
                return few
            shared = torch.randn((*few.shape[: self.axis], 1, *few.shape[self.axis + 1 :]), generator=generator)
            own = torch.randn(few.shape, generator=generator)
            return (math.sqrt(1 - spread**2) * shared + spread * own).to(few)

        return self._on_tokens(draw, count)

    def _on_tokens(self, change: Callable[[Tensor], Tensor], count: int) -> TokenCall:
        def changed(x: Any) -> Any:
            carries = isinstance(x, Tensor) and x.ndim > self.axis and x.shape[self.axis] == self.length
            return change(x) if carries else x

        args = tuple(changed(x) for x in self.args)
        return TokenCall(args, {name: changed(x) for name, x in self.kwargs.items()}, self.axis, count)


def token_wise(module: nn.Module, forward: Callable[..., Any], call: TokenCall) -> bool:
    """Whether the module, whose forward is given, does to each token what it would do to it alone.

    Shown by experiments with random tokens; False where one of them fails or cannot be made.
    """
    return all(_same_in_chunks(forward, call.at_random(seed, spread)) for seed, spread in enumerate(SPREADS))


def run_in_chunks(forward: Callable[..., Any], call: TokenCall, size: int) -> Any:
    """What `forward` returns for the call, a tensor or a tuple, computed `size` rows of the token axis at a time.

    Raises ValueError or TypeError if what it returns does not have the tokens that it was given.
    """
    results: list[_Result | None] = []
    several = False
    for start in range(0, call.length, size):
        part = call.part(start, min(start + size, call.length))
        returned = forward(*part.args, **part.kwargs)
        several = type(returned) is tuple  # any other kind of output is no tensor, and refused
        outputs = returned if several else (returned,)
        if start == 0:
            results = [None if output is None else _Result(output, part, call.length) for output in outputs]
        for result, output in zip(results, outputs, strict=True):
            if result is not None:
                result.write(output, part, start)
        del returned, outputs  # or they would live through the next chunk
    whole = tuple(None if result is None else result.tensor() for result in results)
    return whole if several else whole[0]


class _Result:
    """One output for all tokens, written chunk by chunk."""

    def __init__(self, first: Any, part: TokenCall, count: int) -> None:
        if not isinstance(first, Tensor):
            raise TypeError(f"expected tensors, got {type(first).__name__}")
        lead = part.hidden.shape[: part.axis]
        # (B, tokens, ...), or (B * tokens, ...) as routers and some mixtures of experts return
        self.flat = first.shape[: part.axis + 1] != (*lead, part.length)
        each = self._view(first, part).shape[part.axis + 1 :]
        self.room = torch.empty((*lead, count, *each), dtype=first.dtype, device=first.device)

    def write(self, output: Tensor, part: TokenCall, start: int) -> None:
        self.room.narrow(part.axis, start, part.length).copy_(self._view(output, part))

    def tensor(self) -> Tensor:
        return self.room.flatten(0, 1) if self.flat else self.room

    def _view(self, output: Tensor, part: TokenCall) -> Tensor:
        expected = (*part.hidden.shape[: part.axis], part.length)
        view = output.unflatten(0, expected) if self.flat and part.axis else output
        if view.shape[: part.axis + 1] != expected:
            raise ValueError(f"expected an output for the tokens {tuple(expected)}, got {tuple(output.shape)}")
        return view


class _Chunks:
    """The chunking of one model, inside one context."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.names: set[str] = set()
        self.tokens: int | None = None  # of each sequence in this forward pass
        self.inside = False  # a module that is chunked, or probed: what it calls is left as it is

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.tokens = read_forward(module, args, kwargs).tokens

    def wrapped(self, name: str, module: nn.Module, code: tuple) -> Callable[..., Any]:
        """`code` is what a verdict on the module rests on."""
        forward = module.forward

        @functools.wraps(forward)
        def chunked(*args: Any, **kwargs: Any) -> Any:
            call = self._call(args, kwargs) if self._wanted(module) else None
            if call is None:
                return forward(*args, **kwargs)
            self.inside = True
            try:
                verdicts, form = _shown.setdefault(module, {}), (*call.form, *code)
                if form not in verdicts:
                    verdicts[form] = token_wise(module, forward, call)
                if verdicts[form]:
                    self.names.add(name)
                    assert self.tokens is not None  # there is a call
                    return run_in_chunks(forward, call, self.size * (call.length // self.tokens))
            finally:
                self.inside = False
            return forward(*args, **kwargs)

        return chunked

    def _wanted(self, module: nn.Module) -> bool:
        if self.inside or self.tokens is None or self.tokens <= self.size:
            return False
        return not torch.is_grad_enabled() and not module.training and not _watched_inside(module)

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> TokenCall | None:
        """None if it is no call on all tokens, or is given more than tensors: a cache, or position embeddings."""
        given = (*args, *kwargs.values())
        hidden = next((x for x in given if isinstance(x, Tensor)), None)
        if hidden is None or not hidden.is_floating_point() or hidden.ndim < 2:
            return None
        if not all(isinstance(x, _PLAIN) for x in given):
            return None
        assert self.tokens is not None  # it is wanted
        axis = 1 if hidden.ndim > 2 else 0
        count = hidden.shape[axis]
        carries_tokens = count == self.tokens if axis else count > 0 and count % self.tokens == 0
        return TokenCall(args, kwargs, axis, count) if carries_tokens else None


def _same_in_chunks(forward: Callable[..., Any], call: TokenCall) -> bool:
    """A router may flip at a near-tie, where chunks round differently: where a choice is made, as large a share of the
    tokens may differ as rounding is of a number. None may in float32 of so few tokens, and none where nothing chooses.
    """
    chooses = _Choices()
    try:
        given = call.hidden.clone()
        with chooses:
            whole = forward(*call.args, **call.kwargs)
        parts = run_in_chunks(forward, call, PROBE_CHUNK)
        eps = max(torch.finfo(dtype).eps for dtype in (given.dtype, torch.float32))
        outputs = [
            (a, b) for a, b in zip(_several(whole), _several(parts), strict=True) if not (a is None and b is None)
        ]
        tokens = math.prod(given.shape[: call.axis + 1])
        differing = torch.stack([_differing(a, b, tokens, eps) for a, b in outputs]).any(0)
        untouched = torch.equal(given, call.hidden)  # what a module writes into its input could be lost in a chunk
        return untouched and int(differing.sum()) <= (SLACK * eps * tokens if chooses.seen else 0)
    except torch.OutOfMemoryError:
        raise  # it says nothing about the module
    except Exception:  # whatever it is that the module does not take, it is not shown to be token-wise
        return False


class _Choices(TorchDispatchMode):
    """Sees whether anything is chosen by its rank."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen |= func._schema.name.removeprefix("aten::") in CHOICES
        return func(*args, **(kwargs or {}))


def _several(returned: Any) -> tuple:
    return returned if type(returned) is tuple else (returned,)


def _code(module: nn.Module) -> tuple:
    """What runs when the module is called: the classes inside it, and forwards that were put on instances."""
    return tuple((type(inner), vars(inner).get("forward")) for inner in module.modules())


def _differing(a: Tensor, b: Tensor, tokens: int, eps: float) -> Tensor:
    """(tokens,) bool: for which tokens an output differs by more than rounding, or is not finite."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"expected the same outputs, got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}")
    a, b = a.reshape(tokens, -1), b.reshape(tokens, -1)
    if not a.is_floating_point():
        return (a != b).any(-1)
    eps = max(eps, torch.finfo(a.dtype).eps)
    a, b = a.double(), b.double()
    typical = a.norm() / math.sqrt(tokens)
    return ~((a - b).norm(dim=-1) <= SLACK * eps * typical)


def _may_be_chunked(module: nn.Module) -> bool:
    """Whether there is something to gain, and nothing that a probe could disturb."""
    single_operator = not any(module.children()) and (
        type(module).__module__.startswith("torch.nn.") or getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )
    stateful = any(True for _ in module.buffers()) and not any(True for _ in module.parameters())  # rotary embeddings
    return not single_operator and not stateful and not any(_mixes_tokens(inner) for inner in module.modules())


def _mixes_tokens(module: nn.Module) -> bool:
    """Attention, linear attention and state-space blocks know their layer, by which they find their cache."""
    if isinstance(module, _ConvNd | nn.RNNBase):
        return True
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    return len(inspect.signature(type(module).forward).parameters) > 2  # more than self and the hidden states


def _watched_inside(module: nn.Module) -> bool:
    """Hooks of a module inside this one would see chunks, and the probe."""
    return any(inner is not module and (inner._forward_hooks or inner._forward_pre_hooks) for inner in module.modules())


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """On the instance, around whatever is there, as under a device map of accelerate."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
