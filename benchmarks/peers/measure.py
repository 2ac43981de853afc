"""One whole run: every engine on every workload of every model, in turns, each engine in a process of its own.

All engines and precisions of a workload are called once a round, each round in another order (a fixed seed). Before
each sample the machine rests, so that threads of the engine before fall asleep, and a short call is made once untimed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import OURS, loads, ours
from benchmarks.peers.loads import Load
from benchmarks.peers.peaks import peaks
from benchmarks.peers.process import Failed, Process
from benchmarks.peers.rival import Rival
from benchmarks.peers.targets import SCALING
from benchmarks.record.setting import as_line, in_words
from fastbert import bench, limits, parity_models
from fastbert.bench import Gate, Progress
from fastbert.models.families import position_limit
from fastbert.provenance import provenance
from fastbert.workloads import Batch

PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf", "ctranslate2")
SECONDS, LEAST, MOST, QUICK = 90.0, 5, 40, 3  # of a workload's rounds, and how many there are
PAUSE, SHORT = 0.05, 0.25  # seconds of rest before a sample; a call below SHORT is made once untimed before
WRONG = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}  # relative error from which an engine computes something else
PAIRS, TEN, SEED = 20, 10, 20240
SCALED = "ragged"  # the workload of the scaling checks
Line = dict[str, Any]
Key = tuple[str, str]  # engine, dtype


@dataclass
class Plan:
    """What is measured. `references` and `gates` are found once and hold in every run."""

    models: Mapping[str, Callable[[], Any]]
    workloads: Sequence[str]
    scaling: bool
    engines: Mapping[str, Rival]
    dtypes: Sequence[str]
    folder: Path
    quick: bool = False
    dry_run: bool = False
    references: dict[tuple[str, str], list[torch.Tensor]] = field(default_factory=dict)
    gates: dict[tuple[str, str, str], Gate] = field(default_factory=dict)

    @property
    def keys(self) -> list[Key]:
        """Every engine in every precision that it has and that is asked for."""
        return [(name, d) for name, rival in self.engines.items() for d in rival.dtypes if d in self.dtypes]

    def gate(self, name: str, model: Any, load: Load, dtype: str) -> Gate:
        """Whether fastbert keeps the parity rule on these batches."""
        key = name, load.name, dtype
        if key not in self.gates:
            self.gates[key] = ours.judged(model, dtype, load.batches)
        return self.gates[key]

    def reference(self, name: str, model: Any, load: Load) -> list[torch.Tensor]:
        """The last hidden state of real tokens [T, H] of each batch, by HuggingFace's model in float64."""
        key = name, load.name
        if key not in self.references:
            self.references[key] = reference(model, load.batches)
        return self.references[key]


def run(plan: Plan, number: int, progress: Progress) -> Iterator[Line]:
    """The rows of a whole run."""
    yield {"part": "provenance", "dry_run": plan.dry_run, "quick": plan.quick, **provenance(PACKAGES)}
    before = peaks(plan.dtypes, plan.dry_run)
    yield {"part": "peaks", "when": "before", "peaks": before}
    for i, (name, make) in enumerate(plan.models.items()):
        progress(f"run {number}: {name}", i, len(plan.models))
        try:
            model, reason = make(), ""
        except Exception as error:
            model, reason = None, in_words(error)
        with contextlib.ExitStack() as ending:
            engines = dict.fromkeys(plan.keys, reason) if reason else made(plan, name, model, ending)
            for workload in plan.workloads:
                what = f"run {number}: {name}, {workload}"
                load = None if reason else loads.load(workload, model, plan.dry_run)
                yield from compared(plan, name, model, workload, load, engines, before, prefixed(progress, what))
            if plan.scaling and OURS in plan.engines:
                yield from scaling(plan, name, model, engines, prefixed(progress, f"run {number}: {name}, scaling"))
    yield {"part": "peaks", "when": "after", "peaks": peaks(plan.dtypes, plan.dry_run)}


def prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, of: progress(f"{prefix}: {what}", done, of)


def made(plan: Plan, name: str, model: Any, ending: contextlib.ExitStack) -> dict[Key, Process | str]:
    """The process of every engine, ready in every precision; or in words why it is not. `ending` ends them."""
    folder = plan.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.pt"
    torch.save(model, file)
    found: dict[Key, Process | str] = {}
    for engine, rival in plan.engines.items():
        keys = [key for key in plan.keys if key[0] == engine]
        reason = rival.available()
        if reason or not keys:
            found |= dict.fromkeys(keys, reason)
            continue
        process = Process(rival, file, folder)
        ending.callback(process.close)
        for key in keys:
            try:
                process.make(key[1])
                found[key] = process
            except Failed as error:
                found[key] = str(error)
    return found


def compared(
    plan: Plan, name: str, model: Any, workload: str, load: Load | None, engines: Mapping[Key, Process | str],
    known: Mapping[str, Any], progress: Progress,
) -> Iterator[Line]:  # fmt: skip
    """A row for each engine on a workload, those that failed too."""
    rows, calls = {}, {}
    for i, (key, process) in enumerate(engines.items()):
        progress("first calls", i, len(engines))
        engine, dtype = key
        row: Line = {"part": "engines", "model": name, "workload": workload, "engine": engine, "dtype": dtype}
        row |= {"title": plan.engines[engine].name, "reason": process if isinstance(process, str) else ""}
        if load is not None and not isinstance(process, str):
            row |= sizes(load, model)
            try:
                row |= first(plan, name, model, load, key, process)
            except Exception as error:
                row["reason"] = reason_of(error)
            if not row["reason"]:
                calls[key] = Guarded(process, " ".join((workload, dtype)))
        rows[key] = row
    samples = {key: seconds for key, seconds in timed(plan, calls, progress).items() if not calls[key].error}
    for key, call in calls.items():
        rows[key] |= {"reason": call.error} if call.error else speed(rows[key], samples[key], known)
    for key, row in rows.items():
        peers = [k for k in samples if k[1] == key[1] and k[0] != OURS]
        best = min(peers, key=lambda k: rows[k]["seconds"]["median"], default=None)
        if key in samples and best is not None:
            row |= {"best_peer": rows[best]["title"], "times_best_peer": as_line(ratio(samples[best], samples[key]))}
        yield row


@dataclass
class Guarded:
    """A call that, once it raised, does nothing more and says in `error` why: the others are timed on."""

    process: Process
    name: str
    error: str = ""

    def __call__(self, rest: float = 0.0, again: bool = False) -> float:
        if not self.error:
            try:
                return self.process.seconds(self.name, rest, again)
            except Failed as error:
                self.error = f"it failed while it was timed: {error}"
        return math.nan


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, Failed) else in_words(error)


def sizes(load: Load, model: Any) -> Line:
    """What a workload holds and costs on paper."""
    lengths = [batch.lengths for batch in load.batches]
    dimensions = limits.Dimensions.of(model.config)
    return {
        "texts": load.texts, "real_tokens": load.real_tokens, "padded_tokens": load.padded_tokens,
        "fill": load.real_tokens / load.padded_tokens, "lengths": lengths, "ids": load.ids,
        "flops": sum(limits.encoder_flops(dimensions, each) for each in lengths),
    }  # fmt: skip


def first(plan: Plan, name: str, model: Any, load: Load, key: Key, process: Process) -> Line:
    """An engine on its batches for the first time: parity of ours, the error, or why it is not timed."""
    engine, dtype = key
    found: Line = {}
    if engine == OURS:
        gate = plan.gate(name, model, load, dtype)
        found["parity"] = gate.words
        if not gate.passed:
            return found | {"reason": f"no speed: parity failed: {gate.words}"}
    outputs, found["first_seconds"] = process.bind(" ".join((load.name, dtype)), dtype, load.batches)
    error = norm = 0.0
    for output, batch, expected in zip(outputs, load.batches, plan.reference(name, model, load), strict=True):
        got = output[batch.attention_mask.bool()].double()
        error, norm = error + float((got - expected).square().sum()), norm + float(expected.square().sum())
    found |= {"relative_error": (error / norm) ** 0.5, "error_against": "HuggingFace in float64"}
    if not found["relative_error"] < WRONG[dtype]:  # NaN too
        found["reason"] = f"it computes something else: relative error {found['relative_error']:.2g}"
    return found


def reference(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    double = copy.deepcopy(model).double()
    with torch.inference_mode():
        outputs = [parity_models.collect(double, batch.inputs(), {}, parts=True) for batch in batches]
    return [output["last_hidden_state"] for output in outputs]


def timed(plan: Plan, calls: Mapping[Key, Guarded], progress: Progress) -> dict[Key, list[float]]:
    """Samples of each engine, as many for every one of them."""
    once = {key: call() for key, call in calls.items()}
    rest = 0.0 if plan.dry_run else PAUSE
    whole = sum(rest + (2 if seconds < SHORT else 1) * seconds for seconds in once.values() if math.isfinite(seconds))
    most = MOST if whole == 0 else min(MOST, int(SECONDS / whole))
    rounds = 2 if plan.dry_run else QUICK if plan.quick else max(LEAST, most)
    samplers = {key: partial(call, rest, once[key] < SHORT) for key, call in calls.items()}
    return bench.in_turns(samplers, rounds, SEED, progress)


def speed(row: Line, seconds: list[float], known: Mapping[str, Any]) -> Line:
    """The figures of an engine's samples."""
    found = bench.summarize(seconds)
    rate, peak = row["flops"] / found.median, known.get(row["dtype"], {}).get("flops_per_second")
    return {
        "seconds": as_line(found), "samples": seconds, "tokens_per_second": row["real_tokens"] / found.median,
        "flops_per_second": rate, "share_of_peak": rate / peak if peak else None,
    }  # fmt: skip


def ratio(base: Sequence[float], own: Sequence[float]) -> bench.Ratio:
    return bench.ratio(base, own, seed=SEED)


def scaling(
    plan: Plan, name: str, model: Any, engines: Mapping[Key, Process | str], progress: Progress
) -> Iterator[Line]:
    """What padding to twice the width costs, and ten times the sequences, over the batch as it is: pairs of samples."""
    for key in (key for key in engines if key[0] == OURS):
        for what in SCALING:
            row: Line = {"part": "scaling", "model": name, "workload": SCALED, "dtype": key[1], "what": what}
            process = engines[key]
            row["reason"] = process if isinstance(process, str) else ""
            if not isinstance(process, str):
                try:
                    row |= scaled(plan, name, model, key, process, what, prefixed(progress, f"{key[1]}, {what}"))
                except Exception as error:
                    row["reason"] = reason_of(error)
            yield row


def scaled(plan: Plan, name: str, model: Any, key: Key, process: Process, what: str, progress: Progress) -> Line:
    dtype, load = key[1], loads.load(SCALED, model, plan.dry_run)
    gate = plan.gate(name, model, load, dtype)
    if not gate.passed:
        return {"reason": f"no speed: parity failed: {gate.words}"}
    (batch,) = load.batches
    other = changed(batch, what, position_limit(model.config))
    for label, given in (("changed", other), ("as is", batch)):
        process.bind(label, dtype, (given,))
    pairs = QUICK if plan.quick or plan.dry_run else PAIRS
    samplers = {label: partial(process.seconds, label) for label in ("changed", "as is")}
    samples = bench.in_turns(samplers, pairs, SEED, progress, "pairs")
    return {"ratio": as_line(ratio(samples["changed"], samples["as is"])), "samples": samples}


def changed(batch: Batch, what: str, positions: int) -> Batch:
    """The batch padded to twice its width, or ten times its rows.

    Raises:
        ValueError: the model has fewer positions.
    """
    if what == "padding doubled":
        if 2 * batch.input_ids.shape[1] > positions:
            raise ValueError(f"the model has {positions} positions")
        return batch.widened(2 * batch.input_ids.shape[1])
    types = None if batch.token_type_ids is None else batch.token_type_ids.repeat(TEN, 1)
    ids, mask = batch.input_ids.repeat(TEN, 1), batch.attention_mask.repeat(TEN, 1)
    return replace(batch, input_ids=ids, attention_mask=mask, token_type_ids=types, lengths=batch.lengths * TEN)
