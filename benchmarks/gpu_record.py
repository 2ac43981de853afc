"""Records what a device does: python -m benchmarks.gpu_record --out DIR

Parts run one after another; each row is appended to DIR/record.jsonl as soon as it is known, a part that raises
leaves its traceback there and the next part runs. Exit code 1: some part raised. results/README.md says what rows hold.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastbert
from benchmarks import stock
from benchmarks.cases import TINY_CASES, Case, OpCall, cases, op_calls, random_model
from fastbert import bench, devices, limits, ops, parity_models, proven, workloads
from fastbert.bench_model import forward
from fastbert.dtypes import DTYPES, dtype_name
from fastbert.ops import self_check
from fastbert.provenance import provenance

Line = dict[str, Any]


@dataclasses.dataclass
class Setting:
    """What to run on, and what parity said so far: (op, case, dtype, backend) → passed, words."""

    device: str
    dry_run: bool
    verdicts: dict[tuple[str, str, str, str], tuple[bool, str]] = dataclasses.field(default_factory=dict)

    @property
    def cases(self) -> tuple[Case, ...]:
        return TINY_CASES if self.dry_run else cases(self.device)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        names = ("fp32", "bf16", "fp16") if self.device.startswith("cuda") else ("fp32", "bf16")
        return {name: DTYPES[name] for name in names}

    @property
    def rounds(self) -> int:
        return 2 if self.dry_run else 30

    def backends(self, op: str, arguments: tuple[Any, ...]) -> dict[str, list[str]]:
        """Backend → why it refuses this call here; `reference` is no candidate."""
        kind = self.device.split(":")[0]
        order = [b for b in stock.OPS[op].order(kind) if b.name != "reference"]
        return {b.name: stock.OPS[op].reasons(b, *arguments) for b in order}

    def verdict(self, call: OpCall, case: Case, dtype: torch.dtype, backend: str) -> tuple[bool, str]:
        """Parity of a backend on this very call, judged once."""
        key = call.op, case.name, dtype_name(dtype), backend
        if key not in self.verdicts:
            self.verdicts[key] = stock.verdict(call, backend)
        return self.verdicts[key]


def part_provenance(setting: Setting) -> Iterator[Line]:
    """What is measured: the card, the machine, versions, and the sources of every kernel of ours."""
    own = [(op.name, name) for op in ops.ALL for name in op.backends if name in proven.OWN]
    sources = {f"{op} {name}": proven.running(op, name) for op, name in own}
    card = devices.card(torch.empty(0, device=setting.device).device)
    yield {"device": setting.device, "card": card, "dry_run": setting.dry_run, **provenance(), "sources": sources}


def part_ceilings(setting: Setting) -> Iterator[Line]:
    """Copy bandwidth, a large square product, and the best rate on each case's own products."""
    megabytes, size, tokens = (8, 256, 64) if setting.dry_run else (1024, 8192, 8192)
    if setting.device == "cpu" and not setting.dry_run:
        megabytes, size, tokens = 256, 2048, 2048
    yield {"what": "copy", "bytes_per_second": limits.copy_bandwidth(setting.device, megabytes)}
    for name, dtype in setting.dtypes.items():
        square = limits.Dimensions(layers=1, hidden=size, intermediate=size)
        peak = limits.gemm_peak(square, dtype, setting.device, tokens=size, repeats=setting.rounds // 2)
        yield {"what": f"matmul {size}", "dtype": name, **peak}
        for case in setting.cases:
            sizes = limits.Dimensions(1, case.hidden, 4 * case.hidden)
            peak = limits.gemm_peak(sizes, dtype, setting.device, tokens=tokens, repeats=setting.rounds // 2)
            yield {"what": "products", "case": case.name, "dtype": name, **peak}


def part_parity(setting: Setting) -> Iterator[Line]:
    """Every backend of every op at every case against the reference in float64, base stock PyTorch."""
    for case in setting.cases:
        for name, dtype in setting.dtypes.items():
            for op, make in op_calls(case, dtype, setting.device).items():
                call = make()
                kind = self_check.name_of(self_check.dtype_of(call.arguments))
                for backend, reasons in setting.backends(op, call.arguments).items():
                    line: Line = {"op": op, "case": case.name, "dtype": name, "input": kind, "backend": backend}
                    if reasons:
                        yield {**line, "refused": reasons}
                        continue
                    passed, words = setting.verdict(call, case, dtype, backend)
                    yield {**line, "passed": passed, "words": words}


@torch.no_grad()  # stock gradients need tensors that autograd takes
def part_ops(setting: Setting) -> Iterator[Line]:
    """Stock PyTorch and every backend of every op at every case, interleaved; a backend is timed if it has parity."""
    for case in setting.cases:
        for name, dtype in setting.dtypes.items():
            for op, make in op_calls(case, dtype, setting.device).items():
                call = make()
                plain = stock.prepared(call)
                costs = {"flops": call.flops, "bytes": call.bytes_moved}
                line: Line = {"op": op, "case": case.name, "dtype": name, **costs}
                candidates: dict[str, Callable[[int], object]] = {"stock": lambda i: plain()}  # noqa: B023
                for backend, reasons in setting.backends(op, call.arguments).items():
                    if reasons:
                        continue
                    passed, words = setting.verdict(call, case, dtype, backend)
                    if passed:
                        candidates[backend] = on_backend(backend, call.run)
                    else:
                        yield {**line, "backend": backend, "note": f"no speed: parity failed: {words}"}
                samples = measure(setting, candidates)
                for backend, seconds in samples.items():
                    yield {**line, "backend": backend, **figures(seconds, samples["stock"])}


def on_backend(backend: str, run: Callable[[], object]) -> Callable[[int], object]:
    """`run` forced to a backend."""

    def forced(_: int) -> object:
        with ops.use_backend(backend):
            return run()

    return forced


def measure(setting: Setting, candidates: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Interleaved seconds per call; short calls are repeated inside a sample to about 2 ms."""
    once = bench.interleave(candidates, 1, device=setting.device)
    shortest = min(seconds[0] for seconds in once.values())
    inner = 1 if setting.dry_run else max(1, min(200, round(2e-3 / max(shortest, 1e-7))))
    return bench.interleave(candidates, setting.rounds, warmup=2, inner=inner, device=setting.device)


def figures(seconds: list[float], base: list[float]) -> Line:
    """Summary, ratio to the base, raw samples."""
    return {
        "seconds": dataclasses.asdict(bench.summarize(seconds)),
        "speedup": dataclasses.asdict(bench.ratio(base, seconds)),
        "samples": seconds,
    }


def part_models(setting: Setting) -> Iterator[Line]:
    """Stock HuggingFace and fastbert: random BERT of each case's sizes on its workload."""
    layers = 1 if setting.dry_run else 12
    for case in setting.cases:
        for name, dtype in setting.dtypes.items():
            theirs = random_model(case, layers, dtype, setting.device)
            batch = workloads.batches(case.workload, vocab_size=theirs.config.vocab_size).batches[0].to(setting.device)
            line: Line = {"case": case.name, "dtype": name, "layers": layers}
            found = parity_models.compare_models(theirs, batch.inputs(), dtype, device=setting.device)
            yield {**line, "passed": found.passed, "worst": dataclasses.asdict(found.worst), "why": found.why}
            if not found.passed:
                yield {**line, "engine": "fastbert", "note": "no speed: parity failed"}
                continue
            ours = fastbert.accelerate(copy.deepcopy(theirs))
            engines = {"huggingface": theirs, "fastbert": ours}
            runs = {engine: lambda i, m=model, b=batch: forward(m, b) for engine, model in engines.items()}
            samples = measure(setting, runs)  # type: ignore[arg-type]
            flops = limits.encoder_flops(limits.Dimensions.of(theirs.config), batch.lengths)
            for engine, seconds in samples.items():
                model = engines[engine]
                memory = limits.peak_memory(lambda m=model, b=batch: forward(m, b), setting.device)  # type: ignore[misc]
                yield {
                    **line,
                    "engine": engine,
                    "real_tokens": batch.real_tokens,
                    "fill": batch.real_tokens / batch.padded_tokens,
                    **figures(seconds, samples["huggingface"]),
                    "flops": flops,
                    "memory_bytes": memory,
                }


PARTS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "provenance": part_provenance,
    "ceilings": part_ceilings,
    "parity": part_parity,
    "ops": part_ops,
    "models": part_models,
}


def record(setting: Setting, out: Path, names: Sequence[str]) -> list[str]:
    """Runs the parts in order, appends their rows to `out`; returns the names of those that raised."""
    out.parent.mkdir(parents=True, exist_ok=True)
    broken = []
    with out.open("a", encoding="utf-8") as file:

        def append(line: Line) -> None:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()

        for name in names:
            begin = time.perf_counter()
            print(f"{name} ...", flush=True)
            try:
                for line in PARTS[name](setting):
                    append({"part": name, **line})
                end: Line = {"done": True}
            except Exception as error:
                broken.append(name)
                end = {"done": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
                print(f"{name}: {end['error']}", file=sys.stderr, flush=True)
            append({"part": name, **end, "wall_seconds": round(time.perf_counter() - begin, 3)})
    return broken


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_record", description=__doc__)
    out_help = "folder for record.jsonl; --dry-run needs none and takes a temporary one"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    parser.add_argument("--device", help="default: cuda where torch sees one, else cpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does every part run")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if given.out is None and not given.dry_run:
        parser.error("--out DIR is needed: where the record goes")
    device = given.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            print("torch sees no CUDA device: recording the CPU")
    elif device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu records the CPU")
    file = (given.out or Path(tempfile.mkdtemp(prefix="gpu_record-"))) / "record.jsonl"
    broken = record(Setting(device, given.dry_run), file, names)
    print(f"{file}" + (f": {', '.join(broken)} raised" if broken else ""))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
