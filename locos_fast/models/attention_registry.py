"""Lends entries of transformers' attention registry to who observes attention calls or steps in, and puts them back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from locos_fast.models.architecture import UnsupportedModelError, forward_globals
from locos_fast.models.hidden_keys import HiddenKeys


class RecordingError(RuntimeError):
    """A recording that was asked for did not come about, or does not reproduce what the model computed."""


class Observer(Protocol):
    """Sees every call that the modules it registered make to their attention implementation."""

    def observe(
        self,
        module: nn.Module,
        implementation: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        output: Tensor,
        kwargs: dict,
    ) -> Tensor | None:
        """output: (B, Sq, H, Dv). Returns None, or what the module shall be given instead of the output."""
        ...


class Intervention(Protocol):
    """Stands between attention modules and their attention function; any number may stand before one module."""

    def attend(
        self, module: nn.Module, implementation: str, given: InterfaceCall, attend: Callable[[], tuple]
    ) -> tuple:
        """`attend()` is what the attention function, or the interventions before this one, return: the output
        (B, Sq, H, Dv) first. Returns the same with another output."""
        ...

    def hides(self, module: nn.Module) -> HiddenKeys | None:
        """The keys that it hides from heads of the module, so that observers can take them out; None if it does
        something else."""
        ...


class AttentionRegistry:
    """Wraps the entries of attention implementations while somebody observes them.

    Each entry is wrapped under its own name and put back when its last observer leaves; the wrapper delegates, and acts
    for observed modules only.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.observers: dict[int, Observer] = {}  # id of an attention module -> who observes it
        self.interventions: dict[int, list[Intervention]] = {}  # id of an attention module -> in order of arrival
        self.lent: dict[str, tuple[int, Callable | None]] = {}  # name -> (observers using it, the entry before)

    @contextlib.contextmanager
    def lend(self, modules: Iterable[Any], observer: Observer) -> Iterator[None]:
        """Raises RecordingError if one of the modules is observed already."""
        modules = list(modules)
        ids = [id(module) for module in modules]
        with self.lock:
            if any(module in self.observers for module in ids):
                raise RecordingError("this model is already being recorded; recordings of one model cannot be nested")
            self.observers.update(dict.fromkeys(ids, observer))
        try:
            with self._wrapped(modules):
                yield
        finally:
            with self.lock:
                for module in ids:
                    del self.observers[module]

    @contextlib.contextmanager
    def intervene(self, modules: Iterable[Any], intervention: Intervention) -> Iterator[None]:
        """Observers see what the intervention returns."""
        modules = list(modules)
        with self.lock:
            for module in modules:
                self.interventions.setdefault(id(module), []).append(intervention)
        try:
            with self._wrapped(modules):
                yield
        finally:
            with self.lock:
                for module in modules:
                    self.interventions[id(module)].remove(intervention)
                    if not self.interventions[id(module)]:
                        del self.interventions[id(module)]

    def hidden_from(self, module: Any) -> list[HiddenKeys]:
        """What interventions hide from heads of this module, in their order."""
        found = (intervention.hides(module) for intervention in self.interventions.get(id(module), ()))
        return [hidden for hidden in found if hidden is not None]

    @contextlib.contextmanager
    def undisturbed(self, modules: Iterable[Any]) -> Iterator[None]:
        """Inside the context, nobody who came before observes these modules or steps in."""
        modules = list(modules)
        with self._without(self.observers, modules), self.unaltered(modules):
            yield

    @contextlib.contextmanager
    def unaltered(self, modules: Iterable[Any]) -> Iterator[None]:
        """Inside the context, nobody who came before steps in."""
        with self._without(self.interventions, modules):
            yield

    @contextlib.contextmanager
    def _without(self, table: dict[int, Any], modules: Iterable[Any]) -> Iterator[None]:
        ids = [id(module) for module in modules]
        with self.lock:
            aside = {module: table.pop(module) for module in ids if module in table}
        try:
            yield
        finally:
            with self.lock:
                table.update(aside)

    @contextlib.contextmanager
    def _wrapped(self, modules: Iterable[Any]) -> Iterator[None]:
        """The entries of the attention implementations that these modules use, wrapped."""
        names = {module.config._attn_implementation for module in modules}
        with self.lock:
            for name in names:
                self._install(name)
        try:
            yield
        finally:
            with self.lock:
                for name in names:
                    self._restore(name)

    def _install(self, name: str) -> None:
        users, before = self.lent.get(name, (0, None))
        if users == 0:
            before = AttentionInterface._global_mapping.get(name)
            AttentionInterface.register(name, self._wrapper(name, before))
        self.lent[name] = (users + 1, before)

    def _restore(self, name: str) -> None:
        users, before = self.lent[name]
        if users > 1:
            self.lent[name] = (users - 1, before)
            return
        del self.lent[name]
        if before is None:
            del AttentionInterface._global_mapping[name]
        else:
            AttentionInterface.register(name, before)

    def _wrapper(self, name: str, before: Callable | None) -> Callable:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
            implementation = before or eager_attention(module)
            observer = self.observers.get(id(module))
            interventions = self.interventions.get(id(module), ())
            if observer is None and not interventions:
                return implementation(module, *args, **kwargs)
            given = interface_call(implementation, args, kwargs)
            attend = functools.partial(implementation, module, *args, **kwargs)
            for intervention in interventions:
                attend = functools.partial(intervention.attend, module, name, given, attend)
            result = attend()
            if observer is None:
                return result
            instead = observer.observe(module, name, given.qkv, given.mask, result[0], given.others)
            return result if instead is None else (instead, *result[1:])

        return attention


class InterfaceCall(NamedTuple):
    """What an attention module hands to its attention function."""

    qkv: tuple[Tensor, Tensor, Tensor]  # (B, H, Sq, D), (B, Hkv, N, D), (B, Hkv, N, Dv)
    mask: Any
    others: dict[str, Any]  # scaling, sliding_window ..., by name


INTERFACE = ("query", "key", "value", "attention_mask")  # after the module; the order is transformers' convention


def interface_call(implementation: Callable, args: tuple, kwargs: dict[str, Any]) -> InterfaceCall:
    """Sort the arguments that follow the module. Query, key, value and mask are the function's next four parameters,
    under whatever name, and may be given by position or by keyword."""
    parameters = inspect.signature(implementation).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    names += INTERFACE[len(names) :]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value, mask = (given.pop(name, None) for name in names[:4])
    return InterfaceCall((query, key, value), mask, given)


registry = AttentionRegistry()


def eager_attention(module: nn.Module) -> Callable:
    """The function a model falls back to for "eager": it lives in the model's own source file, not in the registry."""
    names = forward_globals(module)
    for name in inspect.unwrap(type(module).forward).__code__.co_names:
        if name.endswith("eager_attention_forward") and name in names:
            return names[name]
    raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function to record")
