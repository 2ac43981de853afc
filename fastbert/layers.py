"""A BERT layer, and a stack of them, over packed tokens: declared ops only.

T real tokens, H hidden size, N heads, D head dim, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import PackedWeight


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the real tokens of a padded batch [B, S] stand.

    Args:
        cu_seqlens: [B+1] int32, where each sequence starts among the packed tokens.
        max_seqlen: an upper bound of the sequence lengths.
        batch, length: B and S.
        indices: [T] int64 into B·S; None: nothing is padded.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    length: int
    indices: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """x [B, S, ...] → [T, ...]."""
        x = x.reshape(self.batch * self.length, *x.shape[2:])
        return x if self.indices is None else x.index_select(0, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """x [T, H] → [B, S, H], pad rows exact zeros."""
        if self.indices is None:
            return x.view(self.batch, self.length, -1)
        return ops.pad(x, self.indices, self.batch, self.length)  # type: ignore[no-any-return]


def pack_mask(mask: Tensor) -> Packing:
    """mask [B, S] of any dtype, nonzero = real → its packing. On a GPU, the one read is that of T."""
    indices, cu_seqlens = ops.unpad(mask)
    batch, length = mask.shape
    max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" and batch else length
    return Packing(cu_seqlens, max_seqlen, batch, length, indices if indices.shape[0] < batch * length else None)


def pack_dense(batch: int, length: int, device: torch.device) -> Packing:
    """The packing of a batch without padding."""
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return Packing(cu_seqlens, length, batch, length)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's parameters as the ops take them; matrices may be packed by `ops.pack_weight`."""

    heads: int
    scale: float
    approximate: str
    qkv_weight: Tensor | PackedWeight  # [3·N·D, H]
    qkv_bias: Tensor | None
    out_weight: Tensor | PackedWeight  # [H, N·D]
    out_bias: Tensor | None
    norm1: tuple[Tensor, Tensor, float]  # gamma [H], beta [H], eps
    w1: Tensor | PackedWeight  # [I, H]
    b1: Tensor | None
    w2: Tensor | PackedWeight  # [H, I]
    b2: Tensor | None
    norm2: tuple[Tensor, Tensor, float]


def attend(x: Tensor, weights: LayerWeights, packing: Packing) -> Tensor:
    """x [T, H] → self-attention with its output projection [T, H], before dropout, residual and LayerNorm."""
    qkv = ops.linear(x, weights.qkv_weight, weights.qkv_bias).unflatten(1, (3, weights.heads, -1))  # [T, 3, N, D]
    out, _ = ops.attention(qkv, packing.cu_seqlens, packing.max_seqlen, weights.scale)
    return ops.linear(out.flatten(1), weights.out_weight, weights.out_bias)  # type: ignore[no-any-return]


def feed_forward(x: Tensor, weights: LayerWeights) -> Tensor:
    """x [T, H] → both products with GELU between them [T, H], before dropout, residual and LayerNorm."""
    return ops.feed_forward(x, weights.w1, weights.b1, weights.w2, weights.b2, weights.approximate)  # type: ignore[no-any-return]


def layer(x: Tensor, weights: LayerWeights, packing: Packing, dtype: torch.dtype) -> Tensor:
    """x [T, H] → [T, H]. Products run in `dtype` (autocast's, if it is on); residual and LayerNorm in x's."""
    h = ops.add_layer_norm(attend(x.to(dtype), weights, packing), None, x, *weights.norm1)[0]
    return ops.add_layer_norm(feed_forward(h.to(dtype), weights), None, h, *weights.norm2)[0]  # type: ignore[no-any-return]


def encode(x: Tensor, stack: Iterable[LayerWeights], packing: Packing, dtype: torch.dtype) -> Iterator[Tensor]:
    """x [T, H] → the output [T, H] of each layer in turn."""
    for weights in stack:
        x = layer(x, weights, packing, dtype)
        yield x
