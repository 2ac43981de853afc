"""Part "parity": every kernel against the reference in float64, and what else must hold of it to be called proven.

Our kernels first run on small calls with everything an op can be asked for (dropout, what is saved, mixed dtypes), at
every edge of tiles: base is PyTorch's built-in. Fresh memory is filled with NaN once, reruns are compared bit by bit.
Then every backend at every case that is timed, base stock PyTorch.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import stock
from benchmarks.cases import Checked, op_calls
from benchmarks.record.load import kinds
from benchmarks.record.setting import DeviceLost, Line, Setting, in_words, input_of, moved_to
from fastbert import ops, parity
from fastbert.dtypes import DTYPES, dtype_name
from fastbert.ops import reference, self_check
from fastbert.ops.registry import Backend, Op
from fastbert.ops.sample_calls import SEED, SampleCall, outputs, sample_calls
from fastbert.proven import OWN

RERUNS = 20
# (seed, site, p) of keep bits: both words of the key, a late layer's site, little and nearly all dropped.
DRAWN = ((SEED, 0, 0.1), (5, 4 * 23, 0.5), (2**62 + 1, 7, 0.9999))


def run(setting: Setting) -> Iterator[Line]:
    for checked in setting.checked:
        for op in ops.ALL:
            for backend in setting.own(op):
                for dtype in kinds(op, checked.dtypes):
                    yield from own_kernel(setting, checked, op, backend, dtype)
    yield from keep_bits(setting)
    yield from timed_cases(setting)


def own_kernel(setting: Setting, checked: Checked, op: Op, backend: Backend, dtype: torch.dtype) -> Iterator[Line]:
    """One kernel in one dtype at one list of lengths."""
    kind = self_check.name_of(dtype)
    name = dtype_name(dtype) if dtype.is_floating_point else kind
    line: Line = {"op": op.name, "case": checked.name, "dtype": name, "input": kind, "backend": backend.name}
    begin, key = time.perf_counter(), (op.name, backend.name, kind)
    if f"{op.name} {backend.name}" in setting.without:
        setting.failures[key] = "an earlier process of this run died of it"
    if key in setting.failures:
        yield {**line, "passed": False, "words": setting.failures[key]}
        return
    setting.running = f"{op.name} {backend.name}"
    try:
        found = check(setting, checked, op, backend, dtype)
    except Exception as error:
        found = {"passed": False, "words": f"it raises {in_words(error)}"}
        setting.failures[key] = found["words"]
    if "refused" not in found:
        backend.verdicts[dtype, setting.place] = ""  # this is a wider check than its self-check, and in these rows
        if not found["passed"]:
            setting.wrong[key] = found["words"]
    yield {**line, **found, "seconds": time.perf_counter() - begin}
    if setting.is_lost:
        raise DeviceLost(setting.running)
    setting.running = ""


@torch.no_grad()
def check(setting: Setting, checked: Checked, op: Op, backend: Backend, dtype: torch.dtype) -> Line:
    """passed, the worst output in words, its ratio; or the reasons why no call is taken."""
    judged: list[tuple[float, str]] = []
    refused: list[str] = []
    for call in sample_calls(op, checked.sizes, dtype):
        arguments = moved_to(call.arguments, setting.place)
        if reasons := backend.reasons(*op.packed(backend, arguments)):
            refused.append(f"{call.what}: {'; '.join(reasons)}")
        else:
            judged += judged_call(setting, op, backend, call, arguments)
    if not judged:
        return {"refused": refused}
    failed = [words for ratio, words in judged if not ratio <= 1]
    ratio, worst = max(judged)
    line: Line = {"passed": not failed, "words": "; ".join(failed[:4]) or worst, "ratio": ratio, "outputs": len(judged)}
    line["reruns"] = reruns(setting)
    return {**line, "calls_refused": refused} if refused else line


def judged_call(
    setting: Setting, op: Op, backend: Backend, call: SampleCall, arguments: tuple[Any, ...]
) -> Iterator[tuple[float, str]]:
    """(ratio, words) of every output, and of what else a call must keep; infinite: it fails, whatever the ratios."""
    exact, lost = moved_to(call.exact(), setting.place), float("inf")
    expected = outputs(op.backends["reference"].run(*exact))
    base = outputs(op.backends["torch"].run(*arguments))
    arguments = op.packed(backend, arguments)
    ours = outputs(backend.run(*arguments))
    with poisoned_memory():
        poisoned = outputs(backend.run(*arguments))
    for wrong in self_check.differences(op.returns(), ours, expected, base):
        yield lost, f"{call.what}: {wrong}"
        return
    for name, got, ref, theirs in zip(op.returns(), ours, expected, base, strict=True):
        if ref.is_floating_point():
            judged = parity.judge(got, ref, theirs, elementwise=name in stock.ELEMENTWISE.get(op.name, ()))
            yield judged.ratio, f"{call.what}: {name}: {judged}"
        else:
            yield 0.0, f"{call.what}: {name} is equal"
    if not same(ours, poisoned):
        yield lost, f"{call.what}: other results where fresh memory holds NaN"
    for i in range(reruns(setting)):
        if not same(ours, outputs(backend.run(*arguments))):
            yield lost, f"{call.what}: rerun {i + 1} gives other bits"
            return


def reruns(setting: Setting) -> int:
    return 2 if setting.dry_run else RERUNS


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN (integers: their largest), so that reading what was never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def keep_bits(setting: Setting) -> Iterator[Line]:
    """Millions of keep bits against the definition in torch arithmetic on the CPU (fastbert/ops/dropout.py)."""
    op, heads, lengths = ops.dropout_bits, 2, (33, 0, 65) if setting.dry_run else (512, 511, 0, 257, 64, 1, 512)
    bounds, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
    if not setting.own(op):
        yield {"what": "keep bits", "note": f"no kernel of ours makes them on {setting.device}"}
    for backend in setting.own(op):
        for seed, site, p in DRAWN:
            sizes = sum(lengths), longest, heads, p
            expected = reference.dropout_bits(torch.tensor(seed), site, bounds, *sizes)
            arguments = torch.tensor(seed, device=setting.place), site, bounds.to(setting.place), *sizes
            line: Line = {"op": op.name, "case": f"keep bits, p = {p}", "dtype": "int64", "input": "int64"}
            line |= {"backend": backend.name, "seed": seed, "site": site}
            if failure := setting.failure(op.name, backend.name, arguments):
                yield {**line, "passed": False, "words": failure}
            elif reasons := backend.reasons(*arguments):
                yield {**line, "refused": reasons}
            else:
                count, equal = heads * sum(n * n for n in lengths), torch.equal(backend.run(*arguments).cpu(), expected)
                words = f"{count:,} bits {'are equal' if equal else 'differ'}: the definition's, computed on the CPU"
                yield {**line, "passed": equal, "words": words, "bits": count}


def timed_cases(setting: Setting) -> Iterator[Line]:
    """Every backend of every op at every case that is timed."""
    for case, name in setting.op_cases:
        dtype = DTYPES[name]
        for op, make in op_calls(case, dtype, setting.device).items():
            call = make()
            for backend, reasons in setting.backends(op, call.arguments).items():
                if setting.on_cuda and backend not in OWN:
                    continue  # PyTorch's own is judged where it is timed
                line: Line = {"op": op, "case": case.name, "dtype": name, "input": input_of(call.arguments)}
                line["backend"] = backend
                if reasons:
                    yield {**line, "refused": reasons}
                    continue
                begin = time.perf_counter()
                try:
                    passed, words = setting.verdict(call, case, dtype, backend)
                except Exception as error:
                    passed, words = False, f"it raises {in_words(error)}"
                    setting.verdicts[op, case.name, name, backend] = passed, words
                yield {**line, "passed": passed, "words": words, "seconds": time.perf_counter() - begin}
                if setting.is_lost:
                    setting.running = f"{op} {backend}" if backend in OWN else ""
                    raise DeviceLost(f"{op} {backend}")
