"""Part "ops": every backend of every op at every case, beside PyTorch's own ways to the same, in turns.

A backend is timed at a case if it keeps the parity rule there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import stock
from benchmarks.cases import Case, OpCall, op_calls
from benchmarks.record.rivals import rivals, variants
from benchmarks.record.setting import Line, Setting, in_words
from benchmarks.record.timer import Samples, figures, timed
from fastbert import limits, ops
from fastbert.dtypes import DTYPES
from fastbert.proven import OWN

SECONDS = 4.0  # a part with less time left begins no further op
# (backend or rival, variant) → what is timed, and what costs other than the op.
Candidates = dict[tuple[str, str], tuple[Callable[[], object], Line]]


@torch.no_grad()  # stock gradients need tensors that autograd takes
def run(setting: Setting) -> Iterator[Line]:
    for case, name in setting.op_cases:
        for op, make in op_calls(case, DTYPES[name], setting.device).items():
            if not setting.has(SECONDS):
                yield {"op": op, "case": case.name, "dtype": name, "cut": "the part's time is over"}
                return
            try:
                yield from timed_op(setting, case, name, make())
            except Exception as error:
                yield {"op": op, "case": case.name, "dtype": name, **setting.raised(error, op)}


def timed_op(setting: Setting, case: Case, name: str, call: OpCall) -> Iterator[Line]:
    """A call on every backend, its variants and rivals; `name`: of the dtype."""
    line: Line = {"op": call.op, "case": case.name, "dtype": name, **costs(setting, call, name)}
    candidates: Candidates = {("stock", ""): (stock.prepared(call), {})}
    for backend, reasons in setting.backends(call.op, call.arguments).items():
        if reasons:
            continue
        passed, words = setting.verdict(call, case, DTYPES[name], backend)
        if not passed:
            yield {**line, "backend": backend, "note": f"no speed: parity failed: {words}"}
            continue
        candidates[backend, ""] = on_backend(backend, call.on(backend).run), {}
        if backend in OWN or setting.dry_run:
            for variant, other in variants(call):
                if not setting.backends(other.op, other.arguments).get(backend, ["absent"]):
                    run = on_backend(backend, other.on(backend).run)
                    candidates[backend, variant] = run, costs(setting, other, name)
    for rival, made in rivals(call):
        try:
            candidates[rival, ""] = made(), {}
        except Exception as error:
            yield {**line, "backend": rival, "note": f"not here: {in_words(error)}"}
    yield from rows(setting, line, candidates)


def rows(setting: Setting, line: Line, candidates: Candidates) -> Iterator[Line]:
    """A row for each candidate; one that raises, in words, without the others being lost."""
    names = {" / ".join(filter(None, key)): key for key in candidates}
    working: dict[str, Callable[[], object]] = {}
    for name, key in names.items():
        setting.running = f"{line['op']} {key[0]}" if key[0] in OWN else ""
        try:
            candidates[key][0]()
            limits.synchronize(setting.device)
        except Exception as error:
            yield {**line, "backend": key[0], "variant": key[1], "note": f"it raises {in_words(error)}"}
        else:
            working[name] = candidates[key][0]
    setting.running = ""
    found: dict[str, Samples] = timed(setting, working)
    for name, samples in found.items():
        key = names[name]
        row = {**line, **candidates[key][1], "backend": key[0], **({"variant": key[1]} if key[1] else {})}
        row |= figures(samples, found["stock"])
        row["share_of_limit"] = row["limit_seconds"] / row["seconds"]["median"]
        setting.timed.append({key: value for key, value in row.items() if key != "samples"})
        yield row


def costs(setting: Setting, call: OpCall, dtype: str) -> Line:
    """What a call costs on paper, and the time that takes at least here."""
    seconds, by = setting.limit(call.flops, call.bytes_moved, dtype)
    return {"flops": call.flops, "bytes": call.bytes_moved, "limit_seconds": seconds, "limited_by": by}


def on_backend(backend: str, run: Callable[[], Any]) -> Callable[[], object]:
    """`run` forced to a backend."""

    def forced() -> object:
        with ops.use_backend(backend):
            return run()

    return forced
