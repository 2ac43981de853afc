"""The card that kernels are launched on, as far as their tiles depend on it, and what torch allows there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

OLDEST = 80  # bfloat16 products and asynchronous copies
# sm_XX → bytes of shared memory that one block may use (CUDA C++ Programming Guide, "Technical specifications")
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
SPILLING = (86, 89)  # sm_XX for which ptxas spills in loops that need no spill on sm_80


@dataclass(frozen=True)
class Card:
    """arch: 10 · major + minor of the compute capability; multiprocessors: how many there are."""

    arch: int
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may use; of a card that is not known, the least of all."""
        return SHARED_MEMORY.get(self.arch, 101376)


INTERPRETED = Card(80, 4)  # what Triton's interpreter stands for, few multiprocessors so that loops over tiles loop
_imitated: Card | None = None


@functools.cache
def card_of(device: torch.device) -> Card:
    """The card of a CUDA device; of a CPU, on which kernels are interpreted or compiled only, the imitated one."""
    if device.type != "cuda":
        return _imitated or INTERPRETED
    found = torch.cuda.get_device_properties(device)
    return Card(10 * found.major + found.minor, found.multi_processor_count)


@contextlib.contextmanager
def imitate(card: Card) -> Iterator[None]:
    """Tiles are chosen for `card` where tensors are on a CPU: for tests in the interpreter, and for compiling ahead."""
    global _imitated
    before, _imitated = _imitated, card
    card_of.cache_clear()
    try:
        yield
    finally:
        _imitated = before
        card_of.cache_clear()


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before Triton's import)."""
    return bool(triton.knobs.runtime.interpret)


def device_reasons(device: torch.device) -> list[str]:
    """Why Triton's kernels do not run on a device, in words; empty: they do."""
    if device.type == "cuda":
        arch = card_of(device).arch
        return [] if arch >= OLDEST else [f"needs sm_{OLDEST}, this is sm_{arch}"]
    return [] if device.type == "cpu" and (_imitated or is_interpreted()) else [f"device {device.type} is not cuda"]


def dtype_reasons(**tensors: torch.Tensor | None) -> list[str]:
    """Why kernels do not take the dtypes of the named tensors, in words; empty: they do."""
    return [
        f"{name} is {tensor.dtype}: it takes float32, float16 and bfloat16"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ]


def precision_of(dtype: torch.dtype) -> str:
    """What fp32 products multiply: "ieee", all bits, unless torch allows TF32; of other dtypes it says nothing."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
