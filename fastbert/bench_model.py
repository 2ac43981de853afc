"""The main job: a model's stock forward and its fastbert forward side by side over workloads."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastbert
from fastbert import bench, limits, workloads
from fastbert.bench import Gate, Progress, Ratio, SpeedRow, quiet
from fastbert.checkpoint import check_ids, load_model, load_tokenizer, public_name, text_limit, title
from fastbert.dtypes import DTYPES
from fastbert.limits import Dimensions
from fastbert.models.families import position_limit
from fastbert.provenance import provenance
from fastbert.workloads import Batch, Batches

STOCK, SORTED, OURS = "HuggingFace", "HF, length-sorted", "fastbert"
TEXTS, QUICK_TEXTS = 2048, 256


@dataclasses.dataclass(frozen=True)
class Padding:
    """Time of our forward on batches padded to twice their width, over its time on the batches as they are."""

    workload: str
    dtype: str
    ratio: Ratio
    samples: dict[str, list[float]]


@dataclasses.dataclass
class Result:
    """Everything `fastbert bench` measured. `to_dict()` is its JSON; no path of this machine is in it."""

    model: str
    title: str
    model_type: str
    device: str
    dimensions: Dimensions
    provenance: dict[str, Any]
    workloads: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    parity: dict[str, Gate] = dataclasses.field(default_factory=dict)
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[SpeedRow] = dataclasses.field(default_factory=list)
    padding_doubled: list[Padding] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.parity.values())

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, "passed": self.passed, **dataclasses.asdict(self)}


def bench_model(
    model: str,
    parity: Callable[[str], Gate],
    *,
    names: Sequence[str] = ("docstrings",),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    device: str = "cpu",
    max_texts: int = TEXTS,
    quick: bool = False,
    progress: Progress = quiet,
) -> Result:
    """Times HF, HF on length-sorted texts and fastbert, in each dtype on each workload.

    Args:
        model: a folder or hub id.
        parity: dtype → verdict; asked before any timing, and fastbert is not timed in a dtype that failed.
        names: of workloads.
        quick: few texts and few rounds.
    """
    reference = _load(model, torch.float32, device)
    config = reference.config
    dimensions = Dimensions.of(config)
    result = Result(public_name(model), title(model), config.model_type, device, dimensions, provenance())
    plans = [_plan(model, config, name, QUICK_TEXTS if quick else max_texts, result) for name in names]
    result.limits["copy_bytes_per_second"] = limits.copy_bandwidth(device)
    for dtype in dtypes:
        result.parity[dtype] = parity(dtype)
        stock = reference if dtype == "fp32" else _load(model, DTYPES[dtype], device)
        ours = fastbert.accelerate(_load(model, DTYPES[dtype], device))
        peak = limits.gemm_peak(dimensions, DTYPES[dtype], device)
        for natural, in_order in plans:
            job = _Job(result, natural, in_order, dtype, device, reference, stock, ours, quick, progress)
            samples = job.time()
            again = limits.gemm_peak(dimensions, DTYPES[dtype], device)
            peak = max(peak, again, key=lambda found: found["flops_per_second"])
            result.rows += job.rows(samples, peak["flops_per_second"])
            result.padding_doubled += job.padding_doubled(position_limit(config))
        result.limits[f"gemm {dtype}"] = peak
    return result


def _load(model: str, dtype: torch.dtype, device: str) -> Any:
    return load_model(model, dtype, head=False).to(device)


def _plan(model: str, config: Any, name: str, max_texts: int, result: Result) -> tuple[Batches, Batches | None]:
    """The workload's batches, and the same texts in batches sorted by length."""
    real_text = workloads.get(name).texts is not None
    tokenizer = load_tokenizer(model) if real_text else None
    longest, why = position_limit(config), "the model's positions"
    if real_text:
        longest, why = text_limit(model, tokenizer, longest)
    make = {
        "vocab_size": config.vocab_size,
        "tokenizer": tokenizer,
        "max_length": longest,
        "max_texts": max_texts,
        "token_types": getattr(config, "type_vocab_size", 0) > 0,
        "pad_id": config.pad_token_id or 0,
    }
    natural = workloads.batches(name, **make)
    if tokenizer:
        check_ids(model, tokenizer, max(int(batch.input_ids.max()) for batch in natural.batches), config.vocab_size)
    result.workloads.append(
        {
            "name": name,
            "source": natural.source,
            "texts": natural.texts,
            "batches": len(natural.batches),
            "real_tokens": natural.real_tokens,
            "padded_tokens": natural.padded_tokens,
            "fill": natural.fill,
            "batch_real_tokens": [batch.real_tokens for batch in natural.batches],
            "cut_at": longest,
            "cut_at_source": why,
            "tokenize_seconds": natural.tokenize_seconds,
            "ids": "tokenizer" if tokenizer else "random",
        }
    )
    return natural, workloads.batches(name, **make, sort=True) if real_text else None


@dataclasses.dataclass
class _Job:
    """One workload in one dtype."""

    result: Result
    natural: Batches
    in_order: Batches | None
    dtype: str
    device: str
    reference: Any
    stock: Any
    ours: Any
    quick: bool
    progress: Progress

    def __post_init__(self) -> None:
        self.batches = [batch.to(self.device) for batch in self.natural.batches]
        order = list(self.in_order.batches) if self.in_order else []
        random.Random(workloads.SEED).shuffle(order)
        self.sorted_batches = [batch.to(self.device) for batch in order]

    def candidates(self) -> dict[str, Callable[[int], Tensor]]:
        """Stock and ours on batch i; stock on a batch of the sorted texts."""
        count = len(self.batches)
        found: dict[str, Callable[[int], Tensor]] = {STOCK: lambda i: forward(self.stock, self.batches[i % count])}
        if self.result.parity[self.dtype].passed:
            found[OURS] = lambda i: forward(self.ours, self.batches[i % count])
        if self.sorted_batches:
            found[SORTED] = lambda i: forward(self.stock, self.sorted_batches[i % count])
        return found

    def time(self) -> dict[str, list[float]]:
        """Every batch once; a workload of a single batch many times."""
        repeats = 3 if self.quick else 15
        if len(self.batches) == 1 and self.natural.padded_tokens < 1000:
            repeats *= 4
        rounds = len(self.batches) if len(self.batches) > 1 else repeats
        what = f"{self.natural.workload}, {self.dtype}"
        return bench.interleave(
            self.candidates(), rounds, warmup=2, device=self.device, progress=self.progress, what=what
        )

    def rows(self, samples: dict[str, list[float]], gemm_peak: float) -> list[SpeedRow]:
        """One row per engine; ours without speed where parity failed."""
        made = []
        for engine in (STOCK, SORTED, OURS):
            source = self.in_order if engine == SORTED else self.natural
            if source is None:
                continue
            row = self._untimed(engine, source)
            if engine not in samples:
                made.append(bench.silenced(row))
                continue
            passes = len(samples[engine]) / len(source.batches)
            made.append(
                bench.timed(
                    row,
                    samples[engine],
                    texts=round(source.texts * passes),
                    real_tokens=round(source.real_tokens * passes),
                    flops=round(row.flops * passes),
                    gemm_peak=gemm_peak,
                    speedup=self._speedup(engine, samples),
                    memory_bytes=self._memory(engine),
                )
            )
        return made

    def _untimed(self, engine: str, source: Batches) -> SpeedRow:
        size, ours = DTYPES[self.dtype].itemsize, engine == OURS
        cost = limits.fused_bytes if ours else limits.stock_bytes
        tokens = [b.real_tokens if ours else b.padded_tokens for b in source.batches]
        return SpeedRow(
            workload=source.workload,
            engine=engine,
            dtype=self.dtype,
            parity=self.result.parity[self.dtype] if ours else None,
            fill=source.fill,
            texts=source.texts,
            real_tokens=source.real_tokens,
            padded_tokens=source.padded_tokens,
            flops=sum(limits.encoder_flops(self.result.dimensions, b.lengths) for b in source.batches),
            bytes_moved=sum(cost(self.result.dimensions, n, size) for n in tokens),
            relative_error=self._relative_error(self.ours if ours else self.stock),
            note=self._path() if ours else "",
        )

    def _speedup(self, engine: str, samples: dict[str, list[float]]) -> Ratio:
        if engine == SORTED:  # its batches hold other texts: only the totals compare
            return Ratio(sum(samples[STOCK]) / sum(samples[SORTED]))
        return bench.ratio(samples[STOCK], samples[engine])

    def _memory(self, engine: str) -> int | None:
        batches = self.sorted_batches if engine == SORTED else self.batches
        largest = max(batches, key=lambda batch: batch.padded_tokens)
        model = self.ours if engine == OURS else self.stock
        return limits.peak_memory(lambda: forward(model, largest), self.device)

    def _relative_error(self, model: Any) -> float:
        """‖out - HF fp32‖ / ‖HF fp32‖ over the real positions of the first batch."""
        batch = self.batches[0]
        real = batch.attention_mask.bool()
        expected = forward(self.reference, batch)[real].double()
        got = forward(model, batch)[real].double()
        return float((got - expected).norm() / expected.norm())

    def _path(self) -> str:
        """Empty when every forward so far took the fast path, else how many did, and what `explain` says."""
        explanation = fastbert.explain(self.ours)
        calls = [base.calls for base in explanation.models]
        fast, total = sum(c.get("", 0) for c in calls), sum(sum(c.values()) for c in calls)
        return "" if fast == total else f"{fast} of {total} forwards took the fast path; {explanation}"

    def padding_doubled(self, positions: int) -> list[Padding]:
        """Ours on up to 12 batches as they are and padded to twice the width, in turns."""
        narrow = [b for b in self.batches if 2 * b.input_ids.shape[1] <= positions][: 4 if self.quick else 12]
        if not narrow or not self.result.parity[self.dtype].passed:
            return []
        wide = [b.widened(2 * b.input_ids.shape[1]) for b in narrow]
        count = len(narrow)
        candidates: dict[str, Callable[[int], object]] = {
            "doubled": lambda i: forward(self.ours, wide[i % count]),
            "as is": lambda i: forward(self.ours, narrow[i % count]),
        }
        samples = bench.interleave(
            candidates,
            count * max(1, (8 if self.quick else 36) // count),
            warmup=2,
            device=self.device,
            progress=self.progress,
            what=f"{self.natural.workload}, {self.dtype}: padding doubled",
        )
        found = bench.ratio(samples["doubled"], samples["as is"])
        return [Padding(self.natural.workload, self.dtype, found, samples)]


@torch.inference_mode()
def forward(model: Any, batch: Batch) -> Tensor:
    """The last hidden state [B, S, H]."""
    hidden: Tensor = model(**batch.inputs()).last_hidden_state
    return hidden
