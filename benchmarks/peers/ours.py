"""fastbert, timed where it keeps the parity rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastbert
from benchmarks.peers.rival import Bind
from fastbert.bench import Gate
from fastbert.bench_model import forward
from fastbert.dtypes import DTYPES
from fastbert.parity_models import compare_models
from fastbert.workloads import Batch

# dtype → what makes a copy of HuggingFace's fp32 model fast in it. A further precision is one more line.
PRECISIONS: dict[str, Callable[[Any], Any]] = {
    "fp32": lambda model: fastbert.accelerate(model),
    "bf16": lambda model: fastbert.accelerate(model.to(torch.bfloat16)),
    "int8": lambda model: fastbert.accelerate(fastbert.quantize(model)),
}
MOST_INT8 = 3e-2  # relative error of the last hidden state


def available() -> str:
    return ""


def make(model: Any, dtype: str, folder: Path) -> Bind:
    own = PRECISIONS[dtype](copy.deepcopy(model))
    return lambda batch: lambda: forward(own, batch)


def judged(model: Any, dtype: str, batches: Sequence[Batch]) -> Gate:
    """The parity rule on the very batches that are timed, int8 by its own bound; the worst in words."""
    if dtype == "int8":
        ours = PRECISIONS[dtype](copy.deepcopy(model))
        error = max(relative_error(ours, model, batch) for batch in batches)
        return Gate(error <= MOST_INT8, f"relative error {error:.4f} of at most {MOST_INT8}")
    found = [compare_models(model, batch.inputs(), DTYPES[dtype]) for batch in batches]
    if slow := [one.why for one in found if not one.fast]:
        return Gate(False, f"the fast path did not run: {slow[0]}")
    worst = max((one.worst for one in found), key=lambda row: row.ratio)
    return Gate(all(one.passed for one in found), f"{worst.tensor} at {worst.ratio:.2f} of what parity allows")


@torch.no_grad()
def relative_error(ours: Any, model: Any, batch: Batch) -> float:
    """Of the last hidden state at real tokens, against HuggingFace's."""
    real = batch.attention_mask.bool()
    got, expected = (m(**batch.inputs()).last_hidden_state[real].double() for m in (ours, model))
    return float((got - expected).norm() / expected.norm())
