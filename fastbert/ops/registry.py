"""How an op is declared, dispatched, forced to a backend and recorded.

An op is declared once (`declare.py`): a schema, a reference, a fake, and a list of backends. A backend accepts a call
or refuses it with reasons in words. The first backend of the order for the call's device that accepts it runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from fastbert.ops import self_check
from fastbert.ops.encoder import packed_layers
from fastbert.ops.packed import Pack, PackedWeight
from fastbert.proven import OWN

NO_BACKWARD = "fastbert.ops.{} cannot be differentiated: {}"

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
        on_request: device types on which it runs only where `use_backend` names it.
        pack: makes of a weight [N, K] what the backend multiplies fastest with; None: it takes plain weights.
        verdicts: of a kernel of ours, what is known of it: (dtype, device or card) → why it may not run; "": it may.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., list[str]] | None = None
    devices: tuple[str, ...] = ()
    on_request: tuple[str, ...] = ()
    pack: Pack | None = None
    verdicts: dict[tuple[torch.dtype, torch.device | str], str] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def reasons(self, *args: Any) -> list[str]:
        """All reasons, in words, why this backend is not made for the call; empty: it is."""
        device = args[0].device.type
        if self.devices and device not in self.devices and device not in self.on_request:
            return [f"it runs on {' and '.join(self.devices)}, not on {device}"]
        return self.refuse(*args) if self.refuse is not None else []


@dataclass(frozen=True)
class Call:
    """A recorded op call: the op, the backend that ran it, the shapes of its tensor arguments."""

    op: str
    backend: str
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated: by another op.

    That op takes the gradient of the first output, then whatever it names of the op's inputs and outputs, and last, if
    it names it, `needed`: which of the gradients are wanted. What is not wanted it returns as an empty tensor.

    Args:
        op: the backward op.
        of: the inputs whose gradients it returns, in the order of its outputs.
        unread: inputs that it computes with only if the output `pre` was not saved, and else takes for their shape;
            they may be edited in place between forward and backward.
    """

    op: Op
    of: tuple[str, ...]
    unread: tuple[str, ...] = ()


@dataclass
class Op:
    """An op: callable, with its backends in order of preference.

    Args:
        name, schema: as torch.library takes them; the op is `torch.ops.fastbert.<name>` too.
        fake: gives empty outputs of the right shapes, for tracing.
        check: takes the op's arguments and returns what is wrong with them, in words.
        gradient: how it is differentiated; None: not at all.
        forward: of a backward op, the op whose gradients it computes.

    Raises:
        ValueError: shapes or dtypes do not fit the op.
        BackendRefused: every backend that may run the call refuses it.
        NotImplementedError: a gradient is asked for of an op that has none (discrete outputs, a `<op>_backward`).
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    check: Callable[..., list[str]]
    gradient: Gradient | None = None
    forward: Op | None = field(default=None, init=False, repr=False)
    backends: dict[str, Backend] = field(default_factory=dict)
    _order: dict[str, tuple[Backend, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _library.define(f"{self.name}{self.schema}")  # type: ignore[no-untyped-call]
        _library.impl(self.name, self.dispatch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fastbert::{self.name}", self.fake, lib=_library)
        if self.gradient is None:
            torch.library.register_autograd(f"fastbert::{self.name}", self.no_backward, lib=_library)
        else:
            self.gradient.op.forward = self
            torch.library.register_autograd(
                f"fastbert::{self.name}", self.backward, setup_context=self.save_for_backward, lib=_library
            )

    @functools.cached_property
    def overload(self) -> Any:
        """The op as torch.library knows it."""
        return getattr(torch.ops.fastbert, self.name).default

    def arguments(self) -> tuple[str, ...]:
        """The names of the op's inputs."""
        return names_in(self.schema.partition("->")[0])

    def returns(self) -> tuple[str, ...]:
        """The names of the op's outputs."""
        return names_in(self.schema.partition("->")[2])

    def no_backward(self, *args: Any) -> None:
        """The backward of an op that has none."""
        if self.name.endswith("_backward"):
            kind = "differentiate the op it belongs to"
        elif self.name == "encoder_forward":
            kind = "it is for inference; the ops of a layer can"
        elif self.name == "quantized_linear":
            kind = "int8 products are for inference: train the model before fastbert.quantize"
        else:
            kind = "its outputs are discrete"
        raise NotImplementedError(NO_BACKWARD.format(self.name, kind))

    def save_for_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the backward op names; only the first output is differentiable."""
        assert self.gradient is not None
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        known = dict(zip(self.arguments() + self.returns(), (*inputs, *outputs), strict=True))
        named = [name for name in self.gradient.op.arguments()[1:] if name != "needed"]
        unread = self.gradient.unread if "pre" in known and known["pre"].dim() == 2 else ()
        ctx.names = [name for name in named if isinstance(known[name], torch.Tensor) and name not in unread]
        ctx.save_for_backward(*(known[name] for name in ctx.names))
        ctx.others = {
            name: value for name, value in known.items() if name in self.arguments() and name not in ctx.names
        }
        ctx.forced = _forced.get()

    def backward(self, ctx: Any, grad: Any, *others: Any) -> tuple[Any, ...]:
        """The gradients of the inputs, by the backward op."""
        assert self.gradient is not None
        wanted = dict(zip(self.arguments(), ctx.needs_input_grad, strict=False))  # trailing defaults are left out
        known = ctx.others | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if torch.is_grad_enabled():  # create_graph=True
            return self.backward_with_graph(grad, known, wanted)
        known["needed"] = [wanted.get(name, False) for name in self.gradient.of]
        token = _forced.set(ctx.forced)  # the choice of the forward; autograd may run in another thread
        try:
            grads = self.gradient.op.overload(grad, *(known[name] for name in self.gradient.op.arguments()[1:]))
        finally:
            _forced.reset(token)
        by_name = dict(zip(self.gradient.of, grads if isinstance(grads, tuple) else (grads,), strict=True))
        return tuple(by_name[name] if wanted[name] else None for name in wanted)

    def backward_with_graph(self, grad: Any, known: dict[str, Any], wanted: dict[str, bool]) -> tuple[Any, ...]:
        """The gradients of the inputs by the reference, whose steps autograd can differentiate again."""
        of = [name for name in wanted if wanted[name]]
        known |= {name: known[name].view_as(known[name]) for name in of}  # an input may come from another one
        output = self.backends["reference"].run(*(known[name] for name in self.arguments()))
        first = output[0] if isinstance(output, tuple) else output
        grads = dict(zip(of, torch.autograd.grad(first, [known[n] for n in of], grad, create_graph=True), strict=True))
        return tuple(grads.get(name) for name in wanted)

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
        """The backends that may run a call now: those chosen in this context, else `order(device)`."""
        names = _forced.get()
        if names is BATCH_INVARIANT and self.name.removesuffix("_backward") in MIXING:
            names = ("triton",)
        if names is None or names is BATCH_INVARIANT:
            return self.order(device)
        return tuple(self.backends[name] for name in names if name in self.backends)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            bound = inspect.signature(self.backends["reference"].run).bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        ):
            return self.overload(*(a.to_dense() if isinstance(a, PackedWeight) else a for a in args))
        return self.dispatch(*args)

    def dispatch(self, *args: Any) -> Any:
        """Runs the call on the first candidate that accepts it, in the dtypes of its inputs (autocast is off)."""
        device = args[0].device.type
        if has_autocast(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.dispatch(*args)
        if wrong := self.check(*args):
            raise ValueError(f"fastbert.ops.{self.name}: {'; '.join(wrong)}")
        for backend in self.candidates(device):
            if not backend.reasons(*args) and (backend.name not in OWN or not self.doubt(backend, args)):
                calls = _recording.get()
                if calls is not None:
                    shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
                    calls.append(Call(self.name, backend.name, shapes))
                return backend.run(*args)
        raise BackendRefused(self.explain(*args))

    def doubt(self, backend: Backend, args: tuple[Any, ...]) -> str:
        """Why a kernel of ours may not run yet, or no more; "": it may. After its first use this is one look-up."""
        return self.verdict(backend, self_check.dtype_of(args), args[0].device)

    def verdict(self, backend: Backend, dtype: torch.dtype, device: torch.device) -> str:
        """The same, in a dtype on a device."""
        known = backend.verdicts.get((dtype, device))
        return self_check.refusal(self, backend, dtype, device) if known is None else known

    def reasons(self, backend: Backend, *args: Any) -> list[str]:
        """All reasons, in words, why one of the backends does not take the call; empty: it does."""
        if (reasons := backend.reasons(*args)) or backend.name not in OWN:
            return reasons
        doubt = self.doubt(backend, args)
        return [doubt] if doubt else []

    def packed(self, backend: Backend, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with plain weights packed for a backend, if it packs them."""
        pack, named = backend.pack, zip(self.arguments(), args, strict=False)  # trailing defaults may be left out
        if pack is None:
            return args

        def one(name: str, a: Any) -> Any:
            if isinstance(a, list) and name == "tensors":
                return packed_layers(a, pack)
            return pack(a) if name in WEIGHTS and isinstance(a, torch.Tensor) else a

        return tuple(one(name, a) for name, a in named)

    def explain(self, *args: Any) -> str:
        """In words, why no candidate takes this call."""
        device = args[0].device.type
        names = _forced.get()
        lines = [f"fastbert.ops.{self.name}: no backend takes this call on {device}"]
        for backend in self.candidates(device):
            lines += [f"  {backend.name}: {reason}" for reason in self.reasons(backend, *args)]
        absent = [name for name in names or () if name not in self.backends and names is not BATCH_INVARIANT]
        lines += [f"  {name}: not a backend of this op (it has {', '.join(self.backends)})" for name in absent]
        return "\n".join(lines)


@functools.cache
def names_in(side: str) -> tuple[str, ...]:
    """The names in one side of a schema, such as "(Tensor x, SymInt[] sizes, float p=0.0)"."""
    return tuple(part.split("=")[0].split()[-1] for part in side.strip("() ").split(",") if part.strip())


@functools.cache
def has_autocast(device: str) -> bool:
    """Whether torch knows autocast on a device type; of others it cannot be asked whether it is on."""
    return torch.amp.is_autocast_available(device)


WEIGHTS = ("weight", "w1", "w2", "exact")  # the arguments that may be packed
BACKENDS = ("reference", "torch", "triton", "cuda", "cpu")
BATCH_INVARIANT = ("batch-invariant",)  # stands in `_forced` for the choice of `use_batch_invariant`
# The ops in which a library's choice of kernel, by the number of rows or sequences, may change the bits of a row.
MIXING = frozenset({"attention", "linear", "linear_gelu", "feed_forward"})


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
