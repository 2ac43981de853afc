"""Each op as stock PyTorch has it, on plain weights: the base of parity and of timings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad(mask: Tensor) -> tuple[Tensor, Tensor]:
    lengths = mask.sum(1, dtype=torch.int32)
    return mask.flatten().nonzero().flatten(), F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch * length, x.shape[1])
    out[indices] = x
    return out.view(batch, length, x.shape[1])


def embed_layer_norm(
    ids: Tensor, types: Tensor, positions: Tensor, words: Tensor, type_table: Tensor, position_table: Tensor,
    gamma: Tensor, beta: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    x = F.embedding(ids, words) + F.embedding(types, type_table) + F.embedding(positions, position_table)
    return F.layer_norm(x, gamma.shape, gamma, beta, eps)


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """SDPA on the padded batch with a key mask, as stock HuggingFace calls it; real rows are returned."""
    lengths = cu_seqlens.diff().long()
    real = torch.arange(max_seqlen, device=qkv.device) < lengths[:, None]  # [B, S]
    padded = qkv.new_zeros(*real.shape, *qkv.shape[1:])
    padded[real] = qkv
    query, key, value = padded.permute(2, 0, 3, 1, 4)  # [B, N, S, D]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None], scale=scale)
    return out.transpose(1, 2)[real]


def add_layer_norm(x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return F.layer_norm(residual + (x + bias), gamma.shape, gamma, beta, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


ALL: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (unpad, pad, embed_layer_norm, attention, add_layer_norm, linear, linear_gelu, feed_forward)
}


def plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with packed weights unpacked."""
    return tuple(a.to_dense() if isinstance(a, Tensor) and a.is_mkldnn else a for a in arguments)


def double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with floating tensors in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in plain(arguments))
