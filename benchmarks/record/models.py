"""Part "models": whole models of random weights, HuggingFace's forward and ours in turns, and one anchor.

The anchor is HuggingFace's model under torch.compile's defaults, with the padding mask and without a mask, which
computes something else where there is padding. A model is timed if it keeps the parity rule. Seconds are the host's,
from the call to the device's end.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastbert
from benchmarks.cases import Case, batch_of, model_cases, random_model
from benchmarks.record.setting import Line, Setting, as_line, in_words
from benchmarks.record.timer import figures, on_host
from fastbert import limits, ops, parity_models
from fastbert.bench_model import forward
from fastbert.dtypes import DTYPES
from fastbert.workloads import Batch

TRAINED = ("base-squad", "large-uniform", "base-dense", "tiny")  # cases whose training step is timed too
ANCHORED = ("base-squad", "base-dense", "large-uniform", "tiny")
COMPILE_SECONDS, SECONDS = 50.0, 6.0  # with less time left no model is compiled, none is timed
EVERY_LENGTH = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 200, 257, 512)
Run = Callable[[], object]


def run(setting: Setting) -> Iterator[Line]:
    """Every case without torch.compile, which takes its time, then the anchors."""
    left_out, models = setting.left_out(), Models(setting)
    if left_out:
        yield {"what": "kernels that models do without", "kernels": left_out}
    listed = model_cases(setting.device, setting.dry_run)
    for case, dtype in listed:
        yield from guarded(setting, models, case, dtype, anchored=False)
    for case, dtype in listed[:1] if setting.dry_run else listed:
        if case.name in ANCHORED:
            yield from guarded(setting, models, case, dtype, anchored=True)


def guarded(setting: Setting, models: Models, case: Case, dtype: str, anchored: bool) -> Iterator[Line]:
    """`timed_model`, which may raise (no memory, say) without the cases behind it being lost."""
    try:
        yield from timed_model(setting, models, case, dtype, anchored)
    except Exception as error:
        yield {"case": case.name, "dtype": dtype, **setting.raised(error, f"the model {case.name}")}


class Models:
    """HuggingFace's models of the cases' sizes and ours, each made and judged once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.made: dict[tuple[Any, ...], tuple[Any, Any, Line]] = {}

    def of(self, case: Case, dtype: str) -> tuple[Any, Any, Line]:
        """Stock, ours, and what parity says."""
        layers = 1 if self.setting.dry_run else case.layers
        key = case.heads, case.dim, layers, dtype
        if key not in self.made:
            stock = random_model(case, layers, DTYPES[dtype], self.setting.device)
            lengths = EVERY_LENGTH[:7] if self.setting.dry_run else EVERY_LENGTH
            inputs = parity_models.ragged_batch(stock, lengths)
            judged = parity_models.compare_models(stock, inputs, DTYPES[dtype], device=self.setting.device)
            parity = {"passed": judged.passed, "worst": as_line(judged.worst), "why": judged.why}
            self.made[key] = stock, fastbert.accelerate(copy.deepcopy(stock)), parity
        return self.made[key]


def timed_model(setting: Setting, models: Models, case: Case, dtype: str, anchored: bool) -> Iterator[Line]:
    """A case's inference and training step; anchored: ours beside HuggingFace's compiled."""
    line: Line = {"case": case.name, "dtype": dtype, "layers": 1 if setting.dry_run else case.layers}
    if not setting.has(SECONDS):
        yield {**line, "cut": "the part's time is over"}
        return
    stock, ours, parity = models.of(case, dtype)
    if not anchored:
        yield {**line, **parity}
    if not parity["passed"]:
        yield {**line, "engine": "fastbert", "note": "no speed: parity failed"}
        ours = None
    batch = batch_of(case, setting.device)
    line |= {
        "texts": len(batch.lengths),
        "real_tokens": batch.real_tokens,
        "fill": batch.real_tokens / batch.padded_tokens,
    }
    line["flops"] = limits.encoder_flops(limits.Dimensions.of(stock.config), batch.lengths)
    line["limit_seconds"] = setting.limit(line["flops"], 0, dtype)[0]
    trained = case.name in TRAINED and not (setting.dry_run and dtype != "fp32")
    for mode in ("inference", "training") if trained else ("inference",):
        step = infer if mode == "inference" else train
        engines = {} if ours is None else {"fastbert": ours}
        engines |= {"huggingface": stock}
        runs: dict[str, Run] = {name: lambda m=m, s=step: s(m, batch) for name, m in engines.items()}  # type: ignore[misc]
        if anchored:
            yield from with_anchor(setting, {**line, "mode": mode}, stock, batch, step, runs)
        else:
            yield from compared(setting, {**line, "mode": mode}, runs, "huggingface")
            if ours is not None:
                yield {**line, "mode": mode, "engine": "fastbert", "kernels": kernels_of(runs["fastbert"])}
    stock.zero_grad(set_to_none=True)


def infer(model: Any, batch: Batch) -> object:
    """The last hidden state."""
    return forward(model.eval(), batch)


def train(model: Any, batch: Batch) -> object:
    """Forward and backward with the config's dropout; the loss reads the rows of real tokens."""
    model.train()
    hidden = model(**batch.inputs()).last_hidden_state
    loss = (hidden * batch.attention_mask[..., None]).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def with_anchor(
    setting: Setting, line: Line, stock: Any, batch: Batch, step: Callable[[Any, Batch], object], runs: dict[str, Run]
) -> Iterator[Line]:
    """HuggingFace's model compiled, masked and maskless, beside the others, as far as there is time."""
    torch.compiler.reset()  # of the models before
    runs, notes = dict(runs), {}
    maskless = dataclasses.replace(batch, attention_mask=None)  # type: ignore[arg-type]
    for name, given in {"compiled": batch, "compiled, no mask": maskless}.items():
        if line["mode"] == "training" and name != "compiled":
            continue  # its loss reads the mask
        if not setting.has(0 if setting.dry_run else COMPILE_SECONDS):
            yield {**line, "engine": name, "cut": f"not compiled: less than {COMPILE_SECONDS:.0f} s were left"}
            continue
        try:
            runs[name], notes[name] = compiled(setting, stock, given, step)
        except Exception as error:
            yield {**line, "engine": name, "note": f"torch.compile failed: {in_words(error)}"}
    if notes:
        yield from compared(setting, line, runs, "huggingface", notes)


def compiled(
    setting: Setting, stock: Any, batch: Batch, step: Callable[[Any, Batch], object], **options: Any
) -> tuple[Run, Line]:
    """A run of the compiled model, and what compiling it took; a dry run only traces it."""
    traced = {"backend": "eager"} if setting.dry_run else options
    model, begin = torch.compile(stock, dynamic=False, **traced), time.perf_counter()

    def once() -> object:
        return step(model, batch)

    for _ in range(3):
        once()
    limits.synchronize(setting.device)
    return once, {"compile_seconds": time.perf_counter() - begin, **({"compiler": "eager"} if setting.dry_run else {})}


def compared(
    setting: Setting, line: Line, runs: dict[str, Run], base: str, notes: dict[str, Line] | None = None
) -> Iterator[Line]:
    """A row for each engine, timed in turns."""
    samples = on_host(setting, runs)
    for engine, found in samples.items():
        row = {**line, "engine": engine, **figures(found, samples[base]), **(notes or {}).get(engine, {})}
        passes = 3 if line["mode"] == "training" else 1  # a backward is two products for each of the forward's
        row["share_of_limit"] = passes * line["limit_seconds"] / row["seconds"]["median"]
        row["tokens_per_second"] = line["real_tokens"] / row["seconds"]["median"]
        yield {**row, "memory_bytes": limits.peak_memory(runs[engine], setting.device)}


def kernels_of(run: Run) -> Line:
    """Op and backend → calls in one run."""
    with ops.record() as calls:
        run()
    return dict(Counter(f"{call.op} {call.backend}" for call in calls))
