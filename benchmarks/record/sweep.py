"""Part "sweep": the call of ours that loses most time against its limit, with its tiles changed one number at a time.

Each change is compiled in a process of its own; what compiles is judged by the parity rule and timed beside the tiles
that the kernel chooses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks import stock
from benchmarks.cases import Case, OpCall, op_calls, op_cases
from benchmarks.record.op_times import on_backend
from benchmarks.record.processes import in_processes
from benchmarks.record.setting import Line, Setting, in_words
from benchmarks.record.timer import figures, timed
from fastbert import limits, ops
from fastbert.dtypes import DTYPES
from fastbert.ops import kernels

FACTORS = {"num_warps": (0.5, 2.0), "num_stages": (-1, 1)}  # stages: so many more; others: so many times as many
DECLARED = ("ctas", "instructions")  # what tables say of a kernel, and nothing launches
LARGEST, MOST_CHANGES, SECONDS = 256, 16, 8.0  # seconds that judging and timing need
Change = tuple[str, int | float]  # the name of a number in Tiles, and its factor (stages: what is added)


def run(setting: Setting) -> Iterator[Line]:
    plain = [r for r in setting.timed if r["backend"] == "triton" and "variant" not in r]
    if not plain:
        yield {"note": f"no kernel of Triton's was timed on {setting.device}: there is nothing to sweep"}
        return
    worst = max(plain, key=lambda row: row["seconds"]["median"] - row["limit_seconds"])
    lost = worst["seconds"]["median"] - worst["limit_seconds"]
    line: Line = {key: worst[key] for key in ("op", "case", "dtype", "limit_seconds")}
    case = next(case for case, _ in op_cases(setting.device, setting.dry_run) if case.name == worst["case"])
    call = op_calls(case, DTYPES[worst["dtype"]], setting.device)[worst["op"]]()
    changes, chosen = changes_of(call)
    yield {**line, "what": "worst", "seconds_lost": lost, "tiles": chosen, "changes": [list(c) for c in changes]}
    yield from swept(setting, case, call, line, changes)


def swept(setting: Setting, case: Case, call: OpCall, line: Line, changes: list[Change]) -> Iterator[Line]:
    """A row for each change: its time beside the chosen tiles', or in words why it has none."""
    candidates: dict[str, Callable[[], object]] = {"chosen": on_backend("triton", call.run)}
    tasks = [(line["op"], case, line["dtype"], setting.device, change) for change in changes]
    for (*_, change), found in in_processes(load_changed, tasks, setting.jobs, setting.deadline - 2 * SECONDS):
        name = in_name(change)
        if "error" in found:
            yield {**line, "tiles": name, "note": found["error"], **({"cut": "no time"} if "cut" in found else {})}
            continue
        if not setting.has(SECONDS):
            yield {**line, "tiles": name, "cut": "no time was left to judge it"}
            continue
        with changed_tiles(line["op"], change):
            try:
                passed, words = stock.verdict(call, "triton")
            except Exception as error:
                passed, words = False, in_words(error)
        if passed:
            candidates[name] = under(change, line["op"], candidates["chosen"])
        else:
            yield {**line, "tiles": name, "note": f"no speed: parity failed: {words}"}
    with torch.no_grad():
        samples = timed(setting, candidates)
    for name, found_samples in samples.items():
        yield {**line, "tiles": name, **figures(found_samples, samples["chosen"])}


def under(change: Change, op: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with changed tiles."""

    def changed() -> object:
        with changed_tiles(op, change):
            return run()

    return changed


def in_name(change: Change) -> str:
    name, factor = change
    return f"{name} {factor:+d}" if isinstance(factor, int) else f"{name} x {factor:g}"


def load_changed(op: str, case: Case, dtype: str, device: str, change: Change) -> Line:
    """Compiles what a call launches with changed tiles, and launches it."""
    call = op_calls(case, DTYPES[dtype], device)[op]()
    backend = stock.OPS[op].backends["triton"]
    with changed_tiles(op, change), torch.no_grad():
        backend.run(*call.arguments)
        limits.synchronize(device)
    return {}


def changes_of(call: OpCall) -> tuple[list[Change], list[str]]:
    """The changes that alter the tiles of a call, and in words the tiles that it chooses."""
    chosen: list[Any] = []
    with replaced(call.op, lambda tiles: chosen.append(tiles) or tiles), torch.no_grad():
        stock.OPS[call.op].backends["triton"].run(*call.arguments)
    names = dict.fromkeys(f.name for tiles in chosen for t in flat(tiles) for f in dataclasses.fields(t))
    found = []
    for name in (name for name in names if name not in DECLARED):
        for factor in FACTORS.get(name, (0.5, 2.0)):
            if any(altered(tiles, (name, factor)) != tiles for tiles in chosen):
                found.append((name, factor))
    return found[:MOST_CHANGES], list(dict.fromkeys(map(str, chosen)))


def flat(tiles: Any) -> list[Any]:
    """A dataclass of tiles and those inside it."""
    inner = [value for f in dataclasses.fields(tiles) if dataclasses.is_dataclass(value := getattr(tiles, f.name))]
    return [tiles, *(deeper for value in inner for deeper in flat(value))]


def altered(tiles: Any, change: Change) -> Any:
    """Tiles with one of their whole numbers changed, wherever it stands; what cannot be changed stays."""
    name, factor = change
    found: dict[str, Any] = {}
    for f in dataclasses.fields(tiles):
        value = getattr(tiles, f.name)
        if dataclasses.is_dataclass(value):
            found[f.name] = altered(value, change)
        elif f.name == name and isinstance(value, int) and not isinstance(value, bool):
            number = value + factor if isinstance(factor, int) else int(value * factor)
            found[f.name] = number if 1 <= number <= LARGEST else value
    return dataclasses.replace(tiles, **found)


@contextlib.contextmanager
def replaced(op: str, seen: Callable[[Any], Any]) -> Iterator[None]:
    """What `choose_..tiles` of an op's module gives passes through `seen`, in every module of kernels that calls it."""
    home = kernels.kernel(op)
    choosers = {value for name, value in vars(home).items() if name.startswith("choose_") and callable(value)}
    places = [(module, name) for module in modules() for name, value in vars(module).items() if is_one(value, choosers)]
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name, chooser in before:
        setattr(module, name, lambda *a, c=chooser, **k: seen(c(*a, **k)))
    try:
        yield
    finally:
        for module, name, chooser in before:
            setattr(module, name, chooser)


def is_one(value: Any, choosers: set[Any]) -> bool:
    return callable(value) and any(value is chooser for chooser in choosers)


def modules() -> list[ModuleType]:
    """The modules of kernels: all, as one that is imported later would keep what is replaced for a while."""
    for op in ops.FORWARD:
        if "triton" in op.backends:
            kernels.kernel(op.name)
    return [module for name, module in list(sys.modules.items()) if name.startswith(f"{kernels.PACKAGE}.")]


def changed_tiles(op: str, change: Change) -> contextlib.AbstractContextManager[None]:
    """Within it an op's kernels are launched with tiles in which a number is changed."""
    return replaced(op, lambda tiles: altered(tiles, change))
