"""`pool`: one vector for each text out of its tokens' vectors, as sentence-transformers pools them."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("cls", "mean", "max")


def pool(hidden: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    """hidden [B, S, H] → [B, H] of its dtype; differentiable, and free of synchronization on a GPU.

    Args:
        hidden: hidden states, e.g. a base model's `last_hidden_state`. What stands at masked positions is not read.
        mask: [B, S] of any dtype, nonzero = a token that counts; None: all do.
        mode: "cls": the first token that counts (position 0 but for left padding); "mean": their mean, summed in
            float32 or better; "max": the largest value of each channel.

    A row without any token gives zeros, never NaN. "mean" and "max" are those of sentence-transformers' Pooling
    (https://github.com/huggingface/sentence-transformers, models/Pooling.py), whose "max" of such a row is -1e9.

    Raises:
        ValueError: an unknown mode, or shapes or a dtype other than these.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it can be {', '.join(map(repr, MODES))}")
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} {list(hidden.shape)}, not floating numbers [B, S, H]")
    batch, length, _ = hidden.shape
    if mask is not None and tuple(mask.shape) != (batch, length):
        raise ValueError(f"mask has shape {list(mask.shape)}, not [{batch}, {length}] as hidden has")
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    if length == 0:
        return hidden.sum(1)
    real = mask.to(hidden.device) != 0  # [B, S]
    empty = ~real.any(1, keepdim=True)  # [B, 1]
    if mode == "cls":
        first = real.int().argmax(1)
        return hidden[torch.arange(batch, device=hidden.device), first].masked_fill(empty, 0)
    if mode == "max":
        values = hidden.masked_fill(~real[..., None], -torch.inf).max(1).values
        return values.masked_fill(empty, 0)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.masked_fill(~real[..., None], 0).sum(1, dtype=wide)  # [B, H]
    return (total / real.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)
