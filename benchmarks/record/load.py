"""Part "load": every kernel of ours compiled and launched once, in processes beside one another.

What Triton compiles there stands in its cache (TRITON_CACHE_DIR), from which later processes load it: a cache that is
carried to the machine makes this part short. A kernel that fails here is not launched by the record itself.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.record.processes import in_processes
from benchmarks.record.setting import Line, Setting, moved_to
from fastbert import limits, ops
from fastbert.dtypes import DTYPES
from fastbert.ops import self_check
from fastbert.ops.registry import Op
from fastbert.ops.sample_calls import FLOATS, Sizes, dtypes, sample_calls

Task = tuple[str, str, str, Sizes, str]  # op, backend, dtype, sizes, device
BY_NAME = {op.name: op for op in ops.ALL}


def kinds(op: Op, names: tuple[str, ...]) -> list[torch.dtype]:
    """The dtypes of an op's main input among those named; of masks and seeds the one that models use."""
    return [DTYPES[name] for name in names] if dtypes(op) == FLOATS else [dtypes(op)[0]]


def run(setting: Setting) -> Iterator[Line]:
    tasks = [
        (op.name, backend.name, self_check.name_of(dtype), checked.sizes, setting.device)
        for checked in setting.checked
        for op in ops.ALL
        for backend in setting.own(op)
        for dtype in kinds(op, checked.dtypes)
        if f"{op.name} {backend.name}" not in setting.without
    ]
    begin, count = time.perf_counter(), Counter(dict.fromkeys(("compiled", "cached", "failed"), 0))
    for (op, backend, kind, sizes, _), found in in_processes(load, tasks, setting.jobs, setting.deadline - 2):
        where = {"op": op, "backend": backend, "input": kind, "heads": sizes.heads, "dim": sizes.dim}
        yield {**where, "tokens": sizes.tokens, **found}
        count.update({key: found.get(key, 0) for key in ("compiled", "cached")})
        if "error" in found and "cut" not in found:
            count["failed"] += 1
            setting.failures[op, backend, kind] = f"it failed in a process of its own: {found['error']}"
    line: Line = {"what": "all", "kernels": len(tasks), **count, "processes": setting.jobs}
    line |= {"cache_given": "TRITON_CACHE_DIR" in os.environ, "seconds": time.perf_counter() - begin}
    if not setting.on_cuda:
        line["note"] = f"of Triton's kernels none is compiled: they do not run on {setting.device}"
    yield line


@torch.no_grad()
def load(op: str, backend: str, kind: str, sizes: Sizes, device: str) -> Line:
    """Runs a kernel on its sample calls; how many specialisations were compiled, and how many Triton's cache had."""
    torch.set_num_threads(1)  # as many processes as there are cores make their calls on the CPU
    told = listen()
    place, kernel = torch.empty(0, device=device).device, BY_NAME[op].backends[backend]
    refused: list[str] = []
    calls, begin = 0, time.perf_counter()
    for call in sample_calls(BY_NAME[op], sizes, getattr(torch, kind)):
        arguments = BY_NAME[op].packed(kernel, moved_to(call.arguments, place))
        if reasons := kernel.reasons(*arguments):
            refused.append(f"{call.what}: {'; '.join(reasons)}")
            continue
        kernel.run(*arguments)
        limits.synchronize(device)
        calls += 1
    line: Line = {"calls": calls, "compiled": told.count(False), "cached": told.count(True)}
    return {**line, **({"refused": refused} if refused else {}), "seconds": time.perf_counter() - begin}


def listen() -> list[bool]:
    """A list that grows by one at each kernel that Triton compiles: whether it stood in its cache."""
    told: list[bool] = []
    try:
        import triton

        def hear(**said: Any) -> None:
            told.append(bool(said.get("cache_hit")))

        triton.knobs.compilation.listener = hear
    except (ImportError, AttributeError):  # no Triton, or one that tells nothing
        pass
    return told
