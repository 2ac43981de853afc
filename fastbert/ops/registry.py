"""How an op is declared, dispatched, forced to a backend and recorded.

An op is declared once (`declare.py`): a schema, a reference, a fake, and a list of backends. A backend accepts a call
or refuses it with reasons in words. The first backend of the order for the call's device that accepts it runs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

NO_BACKWARD = "fastbert.ops.{} has no backward yet: call it under torch.no_grad() or torch.inference_mode()"

_library = torch.library.Library("fastbert", "DEF")  # type: ignore[no-untyped-call]

_forced: ContextVar[tuple[str, ...] | None] = ContextVar("fastbert_backend", default=None)
_recording: ContextVar[list[Call] | None] = ContextVar("fastbert_calls", default=None)


class BackendRefused(RuntimeError):
    """No backend that may run this call accepts it. The message holds every reason of every backend."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: "reference", "torch", "triton", "cuda" or "cpu".
        run: the implementation; takes the op's arguments.
        refuse: takes the op's arguments and returns all reasons, in words, why `run` cannot take them; None: never.
        devices: device types on which it is chosen by itself; empty: any.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., list[str]] | None = None
    devices: tuple[str, ...] = ()

    def reasons(self, *args: Any) -> list[str]:
        """All reasons, in words, why this backend cannot take the call; empty: it can."""
        device = args[0].device.type
        if self.devices and device not in self.devices:
            return [f"it runs on {' and '.join(self.devices)}, not on {device}"]
        return self.refuse(*args) if self.refuse is not None else []


@dataclass(frozen=True)
class Call:
    """A recorded op call: the op, the backend that ran it, the shapes of its tensor arguments."""

    op: str
    backend: str
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass
class Op:
    """An op: callable, with its backends in order of preference.

    Args:
        name, schema: as torch.library takes them; the op is `torch.ops.fastbert.<name>` too.
        fake: gives empty outputs of the right shapes, for tracing.
        check: takes the op's arguments and returns what is wrong with them, in words.

    Raises:
        ValueError: shapes or dtypes do not fit the op.
        BackendRefused: every backend that may run the call refuses it.
        NotImplementedError: a gradient is asked for; the ops have no backward yet.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    check: Callable[..., list[str]]
    backends: dict[str, Backend] = field(default_factory=dict)
    _order: dict[str, tuple[Backend, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _library.define(f"{self.name}{self.schema}")  # type: ignore[no-untyped-call]
        _library.impl(self.name, self.dispatch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fastbert::{self.name}", self.fake, lib=_library)
        torch.library.register_autograd(f"fastbert::{self.name}", self.no_backward, lib=_library)

    def no_backward(self, *args: Any) -> None:
        """The backward of the op as torch.ops.fastbert knows it."""
        raise NotImplementedError(NO_BACKWARD.format(self.name))

    def add(self, backend: Backend) -> None:
        """Adds a backend behind those there; `reference`, the specification, is always tried last."""
        self.backends[backend.name] = backend
        self._order.clear()

    def order(self, device: str) -> tuple[Backend, ...]:
        """The backends tried by themselves on a device type, first choice first."""
        if device not in self._order:
            fits = [b for b in self.backends.values() if not b.devices or device in b.devices]
            self._order[device] = tuple(sorted(fits, key=lambda b: b.name == "reference"))
        return self._order[device]

    def candidates(self, device: str) -> tuple[Backend, ...]:
        """The backends that may run a call now: those of `use_backend`, else `order(device)`."""
        names = _forced.get()
        if names is None:
            return self.order(device)
        return tuple(self.backends[name] for name in names if name in self.backends)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            bound = inspect.signature(self.backends["reference"].run).bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        if torch.compiler.is_compiling():
            return getattr(torch.ops.fastbert, self.name)(*args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(NO_BACKWARD.format(self.name))
        return self.dispatch(*args)

    def dispatch(self, *args: Any) -> Any:
        """Runs the call on the first candidate that accepts it, in the dtypes of its inputs (autocast is off)."""
        device = args[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.dispatch(*args)
        if wrong := self.check(*args):
            raise ValueError(f"fastbert.ops.{self.name}: {'; '.join(wrong)}")
        for backend in self.candidates(device):
            if not backend.reasons(*args):
                calls = _recording.get()
                if calls is not None:
                    shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
                    calls.append(Call(self.name, backend.name, shapes))
                return backend.run(*args)
        raise BackendRefused(self.explain(*args))

    def explain(self, *args: Any) -> str:
        """In words, why no candidate takes this call."""
        device = args[0].device.type
        names = _forced.get()
        lines = [f"fastbert.ops.{self.name}: no backend takes this call on {device}"]
        for backend in self.candidates(device):
            lines += [f"  {backend.name}: {reason}" for reason in backend.reasons(*args)]
        absent = [name for name in names or () if name not in self.backends]
        lines += [f"  {name}: not a backend of this op (it has {', '.join(self.backends)})" for name in absent]
        return "\n".join(lines)


BACKENDS = ("reference", "torch", "triton", "cuda", "cpu")


@contextlib.contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Forces the choice of backend in this context (and thread): the first of `names` that accepts a call runs it.

    An op with none of these backends, or whose named backends all refuse, raises `BackendRefused`: nothing falls back
    in silence. `use_backend("cpu", "torch")` allows both.

    Raises:
        ValueError: no name, or an unknown one.
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        named = ", ".join(unknown) or "(none given)"
        raise ValueError(f"unknown backend {named}; the backends are {', '.join(BACKENDS)}")
    token = _forced.set(names)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Records the op calls made in this context: `with record() as calls: ...`."""
    calls: list[Call] = []
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)
