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
    qkv, out, seed = zeros(tokens, 3, 12, 64), zeros(tokens, 12, 64), zeros(dtype=torch.int64)
    row, lse = zeros(tokens, dtype=torch.float32), zeros(12, tokens, dtype=torch.float32)
    pre, all_three, all_five = zeros(tokens, inner), [True] * 3, [True] * 5
    tables = ids, ids, ids, weight, weight, weight
    return {
        "unpad": (mask,),
        "pad": (x, torch.arange(tokens, device=device), 2, 5),
        "pad_backward": (zeros(2, 5, hidden), torch.arange(tokens, device=device)),
        "embed_layer_norm": (*tables, gain, gain, 1e-12),
        "embed_layer_norm_backward": (x, *tables, gain, row, row, x, 0.0, None, -1, -1, all_five),
        "dropout_bits": (seed, 0, bounds, tokens, 5, 12, 0.1),
        "attention": (qkv, bounds, 5, 0.125),
        "attention_backward": (out, qkv, out, lse, bounds, 5, 0.125, None, 0.0),
        "add_layer_norm": (x, gain, x, gain, gain, 1e-12),
        "add_layer_norm_backward": (x, x, gain, x, gain, row, row, 0.0, None, 0, all_five),
        "linear": (x, weight, gain),
        "linear_backward": (x, x, weight, all_three),
        "linear_gelu": (x, first, bias),
        "linear_gelu_backward": (pre, x, first, bias, pre, "none", all_three),
        "feed_forward": (x, first, bias, second, gain),
        "feed_forward_backward": (x, x, first, bias, second, pre, "none", all_five),
    }
