"""What the parts of a record share: what to run on, what is known so far, how much time is left."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import stock
from benchmarks.cases import CHECKED, Case, Checked, OpCall, op_cases
from fastbert import limits
from fastbert.dtypes import DTYPES, dtype_name
from fastbert.ops import self_check
from fastbert.ops.registry import Backend, Op
from fastbert.proven import OWN

Line = dict[str, Any]


class DeviceLost(RuntimeError):
    """Nothing runs on the device any more in this process; after what."""

    def __init__(self, after: str) -> None:
        super().__init__(f"nothing runs on the device any more in this process, after {after}")


@dataclass
class Setting:
    """What to run on, and what is known so far.

    Args:
        without: kernels that are left out, "attention triton": an earlier process of this run died of them.
        deadline: what `time.monotonic` says when the part that runs now must end.
        running: the kernel that runs at this moment, "attention triton"; "": none of ours.
        verdicts: (op, case, dtype, backend) → passed, words.
        failures: (op, backend, dtype of the main input) → why the kernel is not run any more, in words.
        wrong: the same of kernels that broke the parity rule somewhere: models do without them.
        bandwidth, peaks: what this device can do at most, in bytes and, by dtype, in FLOP/s.
        timed: the rows of the part "ops", for the sweep.
    """

    device: str
    dry_run: bool
    without: tuple[str, ...] = ()
    deadline: float = math.inf
    running: str = ""
    verdicts: dict[tuple[str, str, str, str], tuple[bool, str]] = field(default_factory=dict)
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    wrong: dict[tuple[str, str, str], str] = field(default_factory=dict)
    bandwidth: float = 0.0
    peaks: dict[str, float] = field(default_factory=dict)
    timed: list[Line] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def is_lost(self) -> bool:
        """Whether nothing runs any more on a GPU in this process."""
        if not self.on_cuda:
            return False
        try:
            torch.cuda.synchronize(self.place)
        except RuntimeError:
            return True
        return False

    def raised(self, error: Exception, what: str) -> Line:
        """The row of what raised, behind which a part goes on.

        Raises:
            DeviceLost: it cannot.
        """
        if self.is_lost:
            raise DeviceLost(what) from error
        return {"error": in_words(error), "traceback": "".join(traceback.format_exception(error))}

    @functools.cached_property
    def place(self) -> torch.device:
        """The device with its index, as tensors on it say."""
        return torch.empty(0, device=self.device).device

    @property
    def op_cases(self) -> tuple[tuple[Case, str], ...]:
        """(case, dtype) of the ops that are timed, most valuable first."""
        return op_cases(self.device, self.dry_run)

    @property
    def checked(self) -> tuple[Checked, ...]:
        """What kernels of ours are checked with beside the cases that are timed."""
        return CHECKED["dry run" if self.dry_run else "cuda" if self.on_cuda else "cpu"]

    @property
    def rounds(self) -> int:
        return 2 if self.dry_run else 30

    @property
    def jobs(self) -> int:
        """Processes at a time."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(16, usable)

    def has(self, seconds: float) -> bool:
        """Whether the part that runs now has so much time left."""
        return time.monotonic() + seconds <= self.deadline

    def own(self, op: Op) -> list[Backend]:
        """The kernels of ours of an op for this device."""
        return [backend for backend in op.order(self.place.type) if backend.name in OWN]

    def backends(self, op: str, arguments: tuple[Any, ...]) -> dict[str, list[str]]:
        """Backend → why it does not run this call here; `reference` is no candidate."""
        found = {}
        for backend in stock.OPS[op].order(self.place.type):
            if backend.name != "reference":
                failure = self.failure(op, backend.name, arguments)
                given = stock.OPS[op].packed(backend, arguments)
                found[backend.name] = [failure] if failure else stock.OPS[op].reasons(backend, *given)
        return found

    def failure(self, op: str, backend: str, arguments: tuple[Any, ...]) -> str:
        """Why a kernel is not used any more for such a call, in words; "": it may be."""
        if f"{op} {backend}" in self.without:
            return "an earlier process of this run died of it"
        return self.failures.get((op, backend, input_of(arguments)), "")

    def verdict(self, call: OpCall, case: Case, dtype: torch.dtype, backend: str) -> tuple[bool, str]:
        """Parity of a backend on this very call, judged once."""
        key = call.op, case.name, dtype_name(dtype), backend
        if key not in self.verdicts:
            self.running = f"{call.op} {backend}" if backend in OWN else ""
            self.verdicts[key] = stock.verdict(call, backend)
            self.running = ""
        return self.verdicts[key]

    def limit(self, flops: int, moved: int, dtype: str) -> tuple[float, str]:
        """The fewest seconds that so much work can take here, and what limits it: "bytes" or "flops"."""
        self.bandwidth = self.bandwidth or limits.copy_bandwidth(self.device, self.megabytes)
        if flops and dtype not in self.peaks:
            square = limits.Dimensions(layers=1, hidden=self.square, intermediate=self.square)
            found = limits.gemm_peak(square, DTYPES[dtype], self.device, tokens=self.square, repeats=5)
            self.peaks[dtype] = found["flops_per_second"]
        seconds = {"bytes": moved / self.bandwidth, "flops": flops / self.peaks[dtype] if flops else 0.0}
        by = max(seconds, key=lambda name: seconds[name])
        return seconds[by], by

    @property
    def megabytes(self) -> int:
        """Of the copy that bandwidth is measured with: far more than any cache."""
        return 8 if self.dry_run else 1024 if self.on_cuda else 256

    @property
    def square(self) -> int:
        """The size of a product [n, n] x [n, n] that fills the device."""
        return 256 if self.dry_run else 8192 if self.on_cuda else 2048

    def left_out(self) -> dict[str, str]:
        """Takes kernels that failed out of models; which, and why."""
        found = {}
        for (op, backend, kind), words in (self.wrong | self.failures).items():
            stock.OPS[op].backends[backend].verdicts[getattr(torch, kind), self.place] = words
            found[f"{op} {backend} {kind}"] = words
        return found


def input_of(arguments: tuple[Any, ...]) -> str:
    """The dtype that a call is checked in: "bfloat16"."""
    return self_check.name_of(self_check.dtype_of(arguments))


def moved_to(arguments: tuple[Any, ...], place: torch.device) -> tuple[Any, ...]:
    """The arguments with their tensors on a device, those in lists too."""

    def moved(a: Any) -> Any:
        if isinstance(a, list):
            return [moved(one) for one in a]
        return a.to(place) if isinstance(a, Tensor) else a

    return tuple(moved(a) for a in arguments)


def in_words(error: BaseException) -> str:
    """An error's type and its first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def as_line(value: Any) -> Line:
    return dataclasses.asdict(value)
