"""One whole run: every engine on every workload of every model, in turns.

All engines and precisions of a workload are called once a round, each round in another order (a fixed seed). Before
each sample the machine rests, so that threads of the engine before fall asleep, and a short call is made once untimed.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import OURS, loads, ours
from benchmarks.peers.loads import Load
from benchmarks.peers.peaks import peaks
from benchmarks.peers.rival import Bind, Rival
from benchmarks.peers.targets import SCALING
from benchmarks.record.setting import as_line, in_words
from fastbert import bench, limits, parity_models
from fastbert.bench import Gate, Progress
from fastbert.models.families import position_limit
from fastbert.provenance import provenance
from fastbert.workloads import Batch

PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf", "ctranslate2")
SECONDS, LEAST, MOST, QUICK = 180.0, 5, 40, 3  # of a workload's rounds, and how many there are
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
        engines = dict.fromkeys(plan.keys, reason) if reason else made(plan, name, model)
        for workload in plan.workloads:
            what = f"run {number}: {name}, {workload}"
            load = None if reason else loads.load(workload, model, plan.dry_run)
            yield from compared(plan, name, model, workload, load, engines, before, prefixed(progress, what))
        if plan.scaling and OURS in plan.engines:
            yield from scaling(plan, name, model, engines, prefixed(progress, f"run {number}: {name}, scaling"))
        del model, engines
        gc.collect()
    yield {"part": "peaks", "when": "after", "peaks": peaks(plan.dtypes, plan.dry_run)}


def prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, of: progress(f"{prefix}: {what}", done, of)


def made(plan: Plan, name: str, model: Any) -> dict[Key, Bind | str]:
    """Every engine, ready; or in words why it is not."""
    folder = plan.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Key, Bind | str] = {}
    for engine, dtype in plan.keys:
        rival = plan.engines[engine]
        reason = rival.available()
        try:
            found[engine, dtype] = reason or rival.make(model, dtype, folder)
        except Exception as error:
            found[engine, dtype] = in_words(error)
    return found


def compared(
    plan: Plan, name: str, model: Any, workload: str, load: Load | None, engines: Mapping[Key, Bind | str],
    known: Mapping[str, Any], progress: Progress,
) -> Iterator[Line]:  # fmt: skip
    """A row for each engine on a workload, those that failed too."""
    rows, runs = {}, {}
    for i, (key, bind) in enumerate(engines.items()):
        progress("first calls", i, len(engines))
        engine, dtype = key
        row: Line = {"part": "engines", "model": name, "workload": workload, "engine": engine, "dtype": dtype}
        row |= {"title": plan.engines[engine].name, "reason": bind if isinstance(bind, str) else ""}
        if load is not None and not isinstance(bind, str):
            row |= sizes(load, model)
            try:
                runs[key], found = first(plan, name, model, load, key, bind)
                row |= found
            except Exception as error:
                row["reason"] = in_words(error)
            if row["reason"]:
                runs.pop(key, None)
        rows[key] = row
    calls = {key: Guarded(call) for key, call in runs.items()}
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

    call: Callable[[int], object]
    error: str = ""

    def __call__(self, i: int) -> None:
        if not self.error:
            try:
                self.call(i)
            except Exception as error:
                self.error = f"it failed while it was timed: {in_words(error)}"


def sizes(load: Load, model: Any) -> Line:
    """What a workload holds and costs on paper."""
    lengths = [batch.lengths for batch in load.batches]
    dimensions = limits.Dimensions.of(model.config)
    return {
        "texts": load.texts, "real_tokens": load.real_tokens, "padded_tokens": load.padded_tokens,
        "fill": load.real_tokens / load.padded_tokens, "lengths": lengths, "ids": load.ids,
        "flops": sum(limits.encoder_flops(dimensions, each) for each in lengths),
    }  # fmt: skip


def first(plan: Plan, name: str, model: Any, load: Load, key: Key, bind: Bind) -> tuple[Callable[[int], object], Line]:
    """An engine on its batches, and what its first call shows: parity of ours, the error, or why it is not timed."""
    found: Line = {}
    if key[0] == OURS:
        gate = plan.gate(name, model, load, key[1])
        found["parity"] = gate.words
        if not gate.passed:
            return lambda i: None, found | {"reason": f"no speed: parity failed: {gate.words}"}
    begin = time.perf_counter()
    bound = [bind(batch) for batch in load.batches]
    error = norm = 0.0
    for call, batch, expected in zip(bound, load.batches, plan.reference(name, model, load), strict=True):
        got = call()[batch.attention_mask.bool()].double()
        error, norm = error + float((got - expected).square().sum()), norm + float(expected.square().sum())
    found |= {"first_seconds": time.perf_counter() - begin, "relative_error": (error / norm) ** 0.5}
    found["error_against"] = "HuggingFace in float64"
    if not found["relative_error"] < WRONG[key[1]]:  # NaN too
        found["reason"] = f"it computes something else: relative error {found['relative_error']:.2g}"
    return lambda i: [call() for call in bound], found


def reference(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    double = copy.deepcopy(model).double()
    with torch.inference_mode():
        outputs = [parity_models.collect(double, batch.inputs(), {}, parts=True) for batch in batches]
    return [output["last_hidden_state"] for output in outputs]


def timed(plan: Plan, runs: Mapping[Key, Callable[[int], object]], progress: Progress) -> dict[Key, list[float]]:
    """Samples of each engine, as many for every one of them."""
    named = {" ".join(key): call for key, call in runs.items()}
    if not named:
        return {}
    once = {name: seconds[0] for name, seconds in bench.interleave(named, 1, warmup=0).items()}
    rest = 0.0 if plan.dry_run else PAUSE
    whole = sum(rest + (2 if seconds < SHORT else 1) * seconds for seconds in once.values())
    rounds = 2 if plan.dry_run else QUICK if plan.quick else max(LEAST, min(MOST, int(SECONDS / whole)))

    def before(name: str) -> None:
        time.sleep(rest)
        if once[name] < SHORT:
            named[name](0)

    samples = bench.interleave(named, rounds, warmup=0, progress=progress, what="rounds", seed=SEED, before=before)
    return {key: samples[" ".join(key)] for key in runs}


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


def scaling(plan: Plan, name: str, model: Any, engines: Mapping[Key, Bind | str], progress: Progress) -> Iterator[Line]:
    """What padding to twice the width costs, and ten times the sequences, over the batch as it is: pairs of samples."""
    for key in (key for key in engines if key[0] == OURS):
        for what in SCALING:
            row: Line = {"part": "scaling", "model": name, "workload": SCALED, "dtype": key[1], "what": what}
            bind = engines[key]
            row["reason"] = bind if isinstance(bind, str) else ""
            if not isinstance(bind, str):
                try:
                    row |= scaled(plan, name, model, key, bind, what, prefixed(progress, f"{key[1]}, {what}"))
                except Exception as error:
                    row["reason"] = in_words(error)
            yield row


def scaled(plan: Plan, name: str, model: Any, key: Key, bind: Bind, what: str, progress: Progress) -> Line:
    load = loads.load(SCALED, model, plan.dry_run)
    gate = plan.gate(name, model, load, key[1])
    if not gate.passed:
        return {"reason": f"no speed: parity failed: {gate.words}"}
    (batch,) = load.batches
    other = changed(batch, what, position_limit(model.config))
    calls = {"changed": bind(other), "as is": bind(batch)}
    candidates = {name: lambda i, call=call: call() for name, call in calls.items()}
    pairs = QUICK if plan.quick or plan.dry_run else PAIRS
    samples = bench.interleave(candidates, pairs, warmup=1, progress=progress, what="pairs", seed=SEED)
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
