"""Each op at each case, on every backend that accepts it.

pytest benchmarks/bench_ops.py --benchmark-group-by=group
pytest benchmarks/bench_ops.py -k "attention and ragged"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Case, cases, op_calls
from fastbert import ops
from fastbert.limits import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = [(op.name, backend) for op in ops.ALL for backend in op.backends if backend != "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases(DEVICE), ids=lambda case: case.name)
@pytest.mark.parametrize(("op", "backend"), BACKENDS, ids=lambda value: value)
@torch.inference_mode()
def test_op(benchmark: Any, op: str, backend: str, case: Case, dtype: torch.dtype) -> None:
    call = op_calls(case, dtype, DEVICE)[op]()
    chosen = getattr(ops, op).backends[backend]
    reasons = chosen.reasons(*call.arguments)
    if chosen.devices and DEVICE not in chosen.devices:
        reasons = [f"{backend} is not for {DEVICE}"]
    if reasons:
        pytest.skip("; ".join(reasons))

    def run() -> None:
        call.run()
        synchronize(DEVICE)

    benchmark.group = f"{op} {case.name} {dtype}"
    with ops.use_backend(backend):
        benchmark(run)
    seconds = benchmark.stats.stats.median if benchmark.stats else None  # None under --benchmark-disable
    if seconds:
        benchmark.extra_info["GFLOP/s"] = round(call.flops / seconds / 1e9, 1)
        benchmark.extra_info["GB/s"] = round(call.bytes_moved / seconds / 1e9, 2)
