"""What this machine can do at most, measured once in a run of the pytest-benchmark files."""

from __future__ import annotations

import functools

import torch

from benchmarks.cases import Case
from fastbert import limits
from fastbert.dtypes import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def gemm_peak(case: Case, dtype: str) -> float:
    """The best rate on the case's own products, in FLOP/s."""
    sizes = limits.Dimensions(1, case.hidden, 4 * case.hidden)
    return float(limits.gemm_peak(sizes, DTYPES[dtype], DEVICE)["flops_per_second"])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read plus written per second by a large copy."""
    return limits.copy_bandwidth(DEVICE)
