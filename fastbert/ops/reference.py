"""The ops' specification: plain PyTorch in float64, rounded once at the end. Nothing here is fast.

T real tokens, B sequences, H hidden size, N heads, D head dim, I intermediate size.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastbert.ops.packed import PackedWeight


def up(x: Tensor | PackedWeight) -> Tensor:
    """x in the precision that the reference computes in."""
    return (x.to_dense() if isinstance(x, PackedWeight) else x).double()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of saved statistics (lse, mean, rstd): fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unpad(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, S], nonzero = real → indices [T] int64 into B·S, cu_seqlens [B+1] int32."""
    real = mask.to(torch.bool)
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    return real.flatten().nonzero().flatten(), cu_seqlens


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """x [T, H] → [B, S, H]; rows that are not in `indices` are exact zeros."""
    out = x.new_zeros(batch * length, x.shape[1])
    out[indices] = x
    return out.view(batch, length, x.shape[1])


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H] → normalized [T, H], mean [T], rstd [T] (Ba et al. 2016, biased variance)."""
    mean = x.mean(1, keepdim=True)
    rstd = (x.sub(mean).square().mean(1, keepdim=True) + eps).rsqrt()
    return (x - mean) * rstd * up(gamma) + up(beta), mean.squeeze(1), rstd.squeeze(1)


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """ids, types, positions [T]; tables [·, H] → LayerNorm of the sum of their rows [T, H]."""
    x = up(words[ids]) + up(position_table[positions])
    if types is not None and type_table is not None:
        x = x + up(type_table[types])
    return layer_norm(x, gamma, beta, eps)[0].to(words.dtype)


def keep_mask(keep_bits: Tensor, length: int) -> Tensor:
    """keep_bits [..., W] int32, bit k of word w is key 32·w + k → bool [..., length]."""
    bits = keep_bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=keep_bits.device)
    return (bits & 1).flatten(-2)[..., :length] != 0


def keep_scale(p: float) -> float:
    """What a kept element is multiplied with: 65536 / (65536 − thr), thr = floor(p·65536 + 0.5) (docs/numerics.md)."""
    threshold = int(p * 65536 + 0.5)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, N, D] → out [T, N, D], lse [N, T]: softmax(q·kᵀ·scale)·v inside each sequence, no causal mask."""
    out, lse = torch.empty_like(qkv[:, 0]), qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=statistics_dtype(qkv))
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        query, key, value = up(qkv[start:end]).permute(1, 2, 0, 3)  # [N, L, D]
        scores = query @ key.transpose(1, 2) * scale  # [N, L, L]
        lse[:, start:end] = scores.logsumexp(2)
        probabilities = scores.softmax(2)
        if keep_bits is not None:
            probabilities = probabilities * keep_mask(keep_bits[:, start:end], end - start) * keep_scale(p)
        out[start:end] = (probabilities @ value).transpose(0, 1).to(qkv.dtype)
    return out, lse


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [T, H] → LayerNorm(residual + x + bias) in the residual's dtype, mean [T], rstd [T]."""
    total = up(residual) + up(x) + (up(bias) if bias is not None else 0)
    y, mean, rstd = layer_norm(total, gamma, beta, eps)
    return y.to(residual.dtype), mean.to(statistics_dtype(residual)), rstd.to(statistics_dtype(residual))


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] → x·weightᵀ + bias [T, N]."""
    y = up(x) @ up(weight).T
    return (y + up(bias) if bias is not None else y).to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x·Φ(x), by erf ("none") or by tanh ("tanh") (Hendrycks & Gimpel 2016)."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x * 0.5**0.5)


def linear_gelu(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none"
) -> Tensor:
    """x [T, K] → gelu(x·weightᵀ + bias) [T, N]."""
    return gelu(linear(up(x), weight, bias), approximate).to(x.dtype)


def feed_forward(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    """x [T, H], w1 [I, H], w2 [H, I] → gelu(x·w1ᵀ + b1)·w2ᵀ + b2 [T, H]."""
    return linear(linear_gelu(up(x), w1, b1, approximate), w2, b2).to(x.dtype)
