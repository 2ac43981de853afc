"""Which backends take a small call of each op, as BERT-base makes it: for what `doctor` and `explain` say."""

from __future__ import annotations

from typing import Any

import torch

from fastbert.ops.declare import ALL


def op_backends(device: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, list[str]]]:
    """Op → backend, in the order they are tried now (`use_backend` is obeyed) → why it refuses; empty: it accepts."""
    arguments = sample_arguments(device, dtype)
    kind = torch.device(device).type
    return {op.name: {b.name: b.reasons(*arguments[op.name]) for b in op.candidates(kind)} for op in ALL}


def sample_arguments(device: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """For each op, the arguments of a call: 2 sequences of 3 and 5 tokens, 12 heads of 64, plain weights."""
    tokens, hidden, inner = 8, 768, 3072

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    ids = zeros(tokens, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5], device=device)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    x, gain, weight = zeros(tokens, hidden), zeros(hidden), zeros(hidden, hidden)
    first, second, bias = zeros(inner, hidden), zeros(hidden, inner), zeros(inner)
    return {
        "unpad": (mask,),
        "pad": (x, torch.arange(tokens, device=device), 2, 5),
        "embed_layer_norm": (ids, ids, ids, weight, weight, weight, gain, gain, 1e-12),
        "attention": (zeros(tokens, 3, 12, 64), bounds, 5, 0.125),
        "add_layer_norm": (x, gain, x, gain, gain, 1e-12),
        "linear": (x, weight, gain),
        "linear_gelu": (x, first, bias),
        "feed_forward": (x, first, bias, second, gain),
    }
