"""Whether a kernel of ours may run: a record in the package vouches for it on this card, or it is checked once.

The check, at a kernel's first use in a dtype on a card, compares a few small calls with PyTorch's by the parity rule.
A kernel that fails is warned of once and refuses from then on.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastbert import devices, proven, torch_private
from fastbert.once import warn_once
from fastbert.ops.encoder import BIAS
from fastbert.ops.sample_calls import CHECKED, outputs, sample_calls
from fastbert.parity import judge

if TYPE_CHECKING:
    from fastbert.ops.registry import Backend, Op

Result = TypeVar("Result")

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as torch says it on any device

_lock = threading.Lock()  # one check at a time
_checking = threading.local()  # set in the thread of a check, and in the one that waits for it


def _unlock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)  # the thread that held it does not exist in the child


class NoThread(RuntimeError):
    """No thread can be started: there are too many, or Python is shutting down."""


class NotChecked(Exception):
    """A check came to no verdict, for want of memory or of a thread; a later one may."""


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(arguments: tuple[Any, ...]) -> torch.dtype:
    """The dtype that a call is checked in: a 16-bit one of its floating tensors, else any of them, else the first's.

    With a weight in int8, beside which outliers are bfloat16 always, it is x's.
    """
    found: torch.dtype = arguments[0].dtype
    if found.itemsize == 2 and found.is_floating_point:
        return found
    if found.is_floating_point and len(arguments) > 1 and getattr(arguments[1], "dtype", None) == torch.int8:
        return found
    for argument in arguments:
        one = argument[BIAS] if isinstance(argument, list) and len(argument) > BIAS else argument  # of layers
        if isinstance(one, Tensor) and one.dtype.is_floating_point:
            dtype = one.dtype
            found = dtype if not found.is_floating_point or dtype.itemsize < found.itemsize else found
    return found


def refusal(op: Op, backend: Backend, dtype: torch.dtype, device: torch.device) -> str:
    """Why a kernel may not run in a dtype on a device, in words; "": it may. A verdict is kept in `verdicts`."""
    card = devices.card(device)
    words = ""
    if proven.record_of(op.name, backend.name, name_of(dtype), card) is None:
        if reason := no_check_now(device):
            return reason
        try:
            _checking.active = True  # before the lock, for which a signal handler's call in this thread must not wait
            with _lock:
                if (dtype, card) not in backend.verdicts:
                    backend.verdicts[dtype, card] = first_use(op, backend, dtype, device)
                failure = backend.verdicts[dtype, card]
        except NotChecked as error:
            return f"it could not be checked: {error}"
        finally:
            _checking.active = False
        if failure:
            words = f"it failed its self-check in {name_of(dtype)} on {card}: {failure}"
            tried = [b.name for b in op.candidates(device.type)]
            instead = tried[tried.index(backend.name) + 1 :] if backend.name in tried else []
            then = f". {instead[0]} is tried instead" if instead else ""
            warn_once(f"fastbert's kernel {op.name} ({backend.name}) is not used: {words}{then}")
    backend.verdicts[dtype, device] = words
    return words


def no_check_now(device: torch.device) -> str:
    """Why nothing can be checked at this moment."""
    if getattr(_checking, "active", False):
        return "a self-check is running"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "it is not yet checked on this card, and cannot be in a CUDA graph: run one forward before the capture"
    if torch_private.transforms_active():
        return "it is not yet checked on this card, and cannot be in a trace or transform: run one forward before"
    return ""


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a thread of its own.

    It knows nothing of the caller's autocast, modes, inference mode, default device or choice of backend.

    Raises:
        NoThread: there can be none.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(function, *arguments)
        except RuntimeError as error:
            raise NoThread(str(error)) from error
        return future.result()


def first_use(op: Op, backend: Backend, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with a kernel; "": nothing.

    Raises:
        NotChecked: there is no memory or no thread for the check.
    """
    try:
        return apart(check, op, backend, dtype, device)
    except Exception as error:  # whatever a kernel raises is what is wrong with it
        words = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        no_means = isinstance(error, (NoThread, MemoryError, torch.OutOfMemoryError))
        if no_means or any(said in words for said in NO_MEMORY):
            raise NotChecked(words) from error
        return words


def check(op: Op, backend: Backend, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with a kernel's numbers; "": nothing."""
    _checking.active = True
    taken = False
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for sizes in CHECKED:
            for call in sample_calls(op, sizes, dtype):
                arguments = tuple(a.to(device) if isinstance(a, Tensor) else a for a in call.arguments)
                given = op.packed(backend, arguments)
                if backend.reasons(*given):
                    continue
                taken = True
                expected = outputs(op.backends["reference"].run(*call.exact()))
                base = outputs(op.backends["torch"].run(*arguments))
                ours = outputs(backend.run(*given))
                for wrong in differences(op.returns(), ours, expected, base):
                    return f"{wrong}, where lengths are {list(sizes.lengths)}, head dim {sizes.dim}: {call.what}"
    return "" if taken else "it takes none of the calls that it would be checked with"


def differences(
    names: tuple[str, ...], ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], base: tuple[Tensor, ...]
) -> Iterator[str]:
    """In words, which outputs are wrong: other kinds of tensors than `base`, or numbers that break the parity rule."""
    for name, got, ref, theirs in zip(names, ours, expected, base, strict=True):
        kind, wanted = ((x.dtype, tuple(x.shape), x.device) for x in (got, theirs))
        if kind != wanted:
            described = (f"{name_of(d)} {list(s)} on {at}" for d, s, at in (kind, wanted))
            yield "{} is {}, not {}".format(name, *described)
        elif not ref.is_floating_point():
            if not torch.equal(got.cpu(), ref):
                yield f"{name} differs"
        elif not (verdict := judge(got, ref, theirs)).passed:
            yield f"{name} is off ({verdict})"


def standing(op: Op, backend: Backend, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """How a kernel of ours stands in a dtype on a device, and that in words.

    "proven", "checked", "failed", or "not run": it cannot be checked now.
    """
    if record := proven.record_of(op.name, backend.name, name_of(dtype), devices.card(device)):
        commit = record["commit"][:9] + record["commit"][40:]  # what follows the hash says that the tree was changed
        return "proven", f"proven on {record['card']}: record of {record['date'][:10]}, commit {commit}"
    words = refusal(op, backend, dtype, device)
    if not words:
        return "checked", "self-check passed"
    return "failed" if backend.verdicts.get((dtype, device)) else "not run", words
