"""Each op at each case, on every backend that accepts it and keeps the parity rule there.

pytest benchmarks/bench_ops.py --benchmark-group-by=group
pytest benchmarks/bench_ops.py -k "attention and ragged"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import stock
from benchmarks.cases import Case, cases, op_calls
from benchmarks.ceilings import DEVICE, copy_bandwidth, gemm_peak
from fastbert import ops
from fastbert.dtypes import DTYPES
from fastbert.limits import synchronize

BACKENDS = [(op.name, b.name) for op in ops.ALL for b in op.order(DEVICE) if b.name != "reference"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", cases(DEVICE), ids=lambda case: case.name)
@pytest.mark.parametrize(("op", "backend"), BACKENDS, ids=lambda value: value)
@torch.no_grad()  # stock gradients need tensors that autograd takes
def test_op(benchmark: Any, op: str, backend: str, case: Case, dtype: str) -> None:
    call = op_calls(case, DTYPES[dtype], DEVICE)[op]().on(backend)
    if reasons := stock.OPS[op].reasons(stock.OPS[op].backends[backend], *call.arguments):
        pytest.skip("; ".join(reasons))
    passed, words = stock.verdict(call, backend)
    if not passed:
        pytest.fail(f"no speed: parity failed: {words}")

    def run() -> None:
        call.run()
        synchronize(DEVICE)

    benchmark.group = f"{op} {case.name} {dtype}"
    with ops.use_backend(backend):
        benchmark(run)
    seconds = benchmark.stats.stats.median if benchmark.stats else None  # None under --benchmark-disable
    if seconds:
        benchmark.extra_info["parity"] = words
        if call.flops:
            benchmark.extra_info["GFLOP/s"] = round(call.flops / seconds / 1e9, 1)
            benchmark.extra_info["share of GEMM peak"] = round(call.flops / seconds / gemm_peak(case, dtype), 3)
        benchmark.extra_info["GB/s"] = round(call.bytes_moved / seconds / 1e9, 2)
        benchmark.extra_info["share of copy bandwidth"] = round(call.bytes_moved / seconds / copy_bandwidth(), 3)
