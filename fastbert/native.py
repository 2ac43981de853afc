"""The one native library, `fastbert/_native.so`: found and loaded once, and where it cannot serve, why not in words."""

import json
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASK_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
LIBRARY = Path(__file__).with_name("_native.so")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")  # csrc/isa.h's
# What torch uses of a CPU, of its own choice or by ATEN_CPU_CAPABILITY: the library uses no more.
MOST = {"DEFAULT": "baseline", "NO AVX": "baseline", "AVX2": "avx2"}


@dataclass(frozen=True)
class Native:
    """`reason` says why the library is absent, `cuda_reason` why its CUDA half is; both are "" for what is there."""

    reason: str
    cuda_reason: str

    @property
    def available(self) -> bool:
        return not self.reason

    @property
    def has_cuda(self) -> bool:
        return not self.cuda_reason


@cache
def load() -> Native:
    """Loads the library into torch at the first call. Never raises."""
    try:
        absent = json.loads(LIBRARY.with_suffix(".json").read_text())
        library, cuda = str(absent["library"]), str(absent["cuda"])
    except (OSError, ValueError, KeyError, TypeError):
        reason = "the native library was not built: fastbert runs from a folder in which it was not installed"
        return Native(reason, reason)
    if library:
        return Native(library, library)
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        reason = f"the native library does not load: {error}"
        return Native(reason, reason)
    limit_isa(MOST.get(torch.backends.cpu.get_cpu_capability(), ISAS[-1]))
    return Native("", cuda)


def limit_isa(most: str) -> str:
    """Kernels for CPUs use at most this of ISAS from now on, in all threads; returns which they use."""
    return ISAS[torch.ops.fastbert_native.limit_isa(ISAS.index(most))]


def isa() -> str:
    """Which of ISAS the kernels for CPUs use."""
    return ISAS[torch.ops.fastbert_native.isa()]


@cache
def has_amx() -> bool:
    """Whether the CPU has AMX, matrix units that the library has no code for."""
    return bool(torch.ops.fastbert_native.has_amx())


@cache
def _cuda_problem() -> str:
    """Why the CUDA kernels cannot run on the current card with its driver; "" when they can."""
    return str(torch.ops.fastbert_native.cuda_problem())


def refuse(device_type: str) -> list[str]:
    """Why the library's ops cannot serve tensors on `device_type` ("cpu", "cuda", ...); empty when they can."""
    native = load()
    if not native.available:
        return [native.reason]
    if device_type == "cpu":
        return []
    if device_type != "cuda":
        return [f"the native library has no kernels for {device_type}"]
    if not native.has_cuda:
        return [f"the native library has no CUDA kernels: {native.cuda_reason}"]
    problem = _cuda_problem()
    return [f"the native library's CUDA kernels do not run here: {problem}"] if problem else []


class Watch:
    """Whether tensors on a CPU stand where they stood, and views of samples of them hold what they held.

    Args:
        tensors: looked at for their address, dtype, shape and strides.
        live: 1-D or 2-D views of samples of them. All are kept alive, so that their addresses are not given to others.
        held: their values. A NaN is equal to itself where the library is.
    """

    __slots__ = "__weakref__", "held", "live", "number", "places", "tensors"

    def __init__(self, tensors: tuple[Tensor, ...], live: tuple[Tensor, ...], held: tuple[Tensor, ...]) -> None:
        self.number, self.tensors, self.live, self.held = 0, tensors, live, held
        if load().available:
            self.number = int(torch.ops.fastbert_native.watch(tensors, live, held))
            weakref.finalize(self, torch.ops.fastbert_native.drop_watch, self.number).atexit = False
        else:
            self.places = places_of(tensors)

    def holds(self) -> bool:
        if self.number:
            return bool(torch.ops.fastbert_native.watch_holds(self.number))
        return places_of(self.tensors) == self.places and all(map(torch.equal, self.live, self.held))


def places_of(tensors: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    """Address, dtype, shape and strides of tensors."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


_emulated = ""  # the name of the library of emulated CUDA kernels that is loaded


def load_emulated(path: Path, name: str) -> None:
    """Loads the CUDA kernels compiled for the CPU, of the tests: from then on they can be asked for on CPU tensors."""
    global _emulated
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    _emulated = name


def refuse_cuda(device_type: str) -> list[str]:
    """Why the library's CUDA kernels cannot serve tensors on a device; on a CPU they do where they are emulated."""
    if device_type == "cuda" or (device_type == "cpu" and _emulated):
        return refuse(device_type) if device_type == "cuda" else []
    return [f"it runs on cuda, not on {device_type}"]


def cuda_op(name: str, device_type: str) -> Any:
    """An op of the library's CUDA kernels, or of the emulated ones for tensors on a CPU."""
    return getattr(getattr(torch.ops, _emulated if device_type == "cpu" else "fastbert_native"), name)


def unpad(mask: Tensor, tokens: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """The real tokens of a padding mask.

    Args:
        mask: [B, S] on a CPU or CUDA device, any strides; bool, integer or float; nonzero (NaN too) means real.
        tokens: T, if it is known: on CUDA the host then does not wait for the device. Of more than there are the last
            indices are -1 there, of fewer the last are left out; a CPU counts them.

    Returns:
        indices: [T] int64, row * S + column of each real token, ascending.
        cu_seqlens: [B + 1] int32, where each row's tokens begin in `indices`; the last is T.
        order: [B] int32, the rows by how many tokens they have, most first, those alike as they stand.

    Raises:
        RuntimeError: the mask is not 2-D, has another dtype, more than 2**31 - 1 rows, columns or real tokens, or
            reaches beyond its storage, which was resized; or the library is absent (ask `refuse` first).
    """
    native = load()
    if not native.available:
        raise RuntimeError(f"unpad: {native.reason}")
    indices, cu_seqlens, order = torch.ops.fastbert_native.unpad(mask, tokens)
    return indices, cu_seqlens, order
