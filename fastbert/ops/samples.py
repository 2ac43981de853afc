"""Which backends take a typical call of each op, and how our kernels stand: for what `doctor` and `explain` say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import devices
from fastbert.ops import self_check
from fastbert.ops.declare import ALL
from fastbert.ops.registry import Backend, Op
from fastbert.ops.sample_calls import FLOATS, TYPICAL, dtypes, sample_calls
from fastbert.proven import OWN


def typical(op: Op, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The arguments of a call as BERT base makes it: 2 sequences of 3 and 5 tokens."""
    call = next(sample_calls(op, TYPICAL, dtype))
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in call.arguments)


def main_dtype(op: Op, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an op's main input in a model of this dtype: masks and seeds are int64, quantized is fp32."""
    kinds = dtypes(op)
    return dtype if kinds == FLOATS and dtype in (*FLOATS, torch.float64) else kinds[0]


def op_backends(device: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, list[str]]]:
    """Op → backend, in the order they are tried now (`use_backend` is obeyed) → why it refuses; empty: it accepts.

    Nothing for a device on which the fast path does not run.
    """
    place = torch.device(device)
    if devices.refusals(place):
        return {}

    def make() -> list[dict[str, tuple[Any, ...]]]:
        calls = ((op, typical(op, main_dtype(op, dtype), place)) for op in ALL)
        return [{b.name: op.packed(b, call) for b in op.backends.values()} for op, call in calls]

    try:
        calls = self_check.apart(make)
    except self_check.NoThread:  # as where Python is shutting down
        calls = make()
    return {
        op.name: {b.name: op.reasons(b, *by_backend[b.name]) for b in op.candidates(place.type)}
        for op, by_backend in zip(ALL, calls, strict=True)
    }


def standings(backends: dict[str, dict[str, list[str]]], device: str, dtype: torch.dtype) -> dict[str, str]:
    """Of what `op_backends` gave: op → how its kernel stands, in words, where a kernel of ours takes the call."""
    place, found = torch.device(device), {}
    for op in ALL:
        taker = next((name for name, reasons in backends.get(op.name, {}).items() if not reasons), "")
        if taker in OWN:
            found[op.name] = self_check.standing(op, op.backends[taker], main_dtype(op, dtype), place)[1]
    return found


def own_kernels(device: str) -> Iterator[tuple[Op, Backend, torch.dtype]]:
    """The kernels of ours for a type of device, in each dtype of their main input."""
    for op in ALL:
        for backend in op.order(device):
            if backend.name in OWN:
                yield from ((op, backend, dtype) for dtype in dtypes(op))
