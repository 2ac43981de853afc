"""Whole forwards, stock HuggingFace and fastbert, on named workloads; random weights of real sizes.

    pytest benchmarks/bench_models.py --benchmark-group-by=group

A forward of ours is timed where it keeps the parity rule. The real checkpoint is timed by `fastbert bench`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

import fastbert
from benchmarks.cases import Case, cases, random_model
from benchmarks.ceilings import DEVICE, gemm_peak
from fastbert import workloads
from fastbert.bench_model import forward
from fastbert.dtypes import DTYPES
from fastbert.limits import Dimensions, encoder_flops, synchronize
from fastbert.parity_models import Comparison, compare_models
from fastbert.workloads import Batch

LAYERS = 4  # a layer repeats: more only takes longer


@pytest.mark.parametrize("engine", ["huggingface", "fastbert"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", cases(DEVICE), ids=lambda case: case.name)
def test_model(benchmark: Any, case: Case, dtype: str, engine: str) -> None:
    model, batch = random_model(case, LAYERS, DTYPES[dtype], DEVICE), batch_of(case)
    if engine == "fastbert":
        found = compared(case, dtype)
        if not found.passed:
            pytest.fail(f"no speed: parity failed: {found.worst} {found.why}")
        benchmark.extra_info["parity"] = f"{found.worst.tensor} at {found.worst.ratio:.2f} of the bound"
        model = fastbert.accelerate(copy.deepcopy(model))

    def run() -> None:
        forward(model, batch)
        synchronize(DEVICE)

    benchmark.group = f"{case.name} {dtype}"
    benchmark(run)
    seconds = benchmark.stats.stats.median if benchmark.stats else None  # None under --benchmark-disable
    if seconds:
        rate = encoder_flops(Dimensions.of(model.config), batch.lengths) / seconds
        benchmark.extra_info["GFLOP/s on real tokens"] = round(rate / 1e9, 1)
        benchmark.extra_info["share of GEMM peak"] = round(rate / gemm_peak(case, dtype), 3)


def batch_of(case: Case) -> Batch:
    return workloads.batches(case.workload, vocab_size=case.vocabulary).batches[0].to(DEVICE)


@functools.cache
def compared(case: Case, dtype: str) -> Comparison:
    """The case's model against HuggingFace by the parity rule, on the batch that is timed."""
    model = random_model(case, LAYERS, DTYPES[dtype], DEVICE)
    return compare_models(model, batch_of(case).inputs(), DTYPES[dtype], device=DEVICE)
