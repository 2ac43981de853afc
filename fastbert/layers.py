"""A BERT layer over packed tokens: declared ops only.

T real tokens, H hidden size, N heads, D head dim, I intermediate size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops, torch_private
from fastbert.ops import PackedWeight
from fastbert.ops.dropout import ATTENTION_OUTPUT, ATTENTION_PROBABILITIES, FEED_FORWARD_OUTPUT, site_of


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the real tokens of a padded batch [B, S] stand.

    Args:
        cu_seqlens: [B+1] int32, where each sequence starts among the packed tokens.
        max_seqlen: an upper bound of the sequence lengths.
        batch, length: B and S.
        indices: [T] int64 into B·S; None: nothing is padded.
        order: [B] int32, the sequences longest first; None: as they stand.
        classes: on a GPU, how many sequences stand in each class of lengths (ops.LENGTH_CLASSES), shortest first.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    length: int
    indices: Tensor | None = None
    order: Tensor | None = None
    classes: tuple[int, ...] = ()

    def pack(self, x: Tensor) -> Tensor:
        """x [B, S, ...] → [T, ...]."""
        x = x.reshape(self.batch * self.length, *x.shape[2:])
        return x if self.indices is None else x.index_select(0, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """x [T, H] → [B, S, H], pad rows exact zeros."""
        if self.indices is None:
            return torch_private.reshaped(x, self.batch, self.length, x.shape[1])
        return ops.pad(x, self.indices, self.batch, self.length)  # type: ignore[no-any-return]


def pack_mask(mask: Tensor) -> tuple[Packing, bool]:
    """mask [B, S] of any dtype, nonzero = real → its packing, and whether column 0 is real in every row.

    The host waits for the device once.
    """
    batch, length = mask.shape
    work: tuple[Any, ...] = ()
    if mask.device.type == "cpu":
        indices, cu_seqlens, _ = ops.unpad(mask)
        dense = indices.shape[0] == batch * length
        first = dense or bool(mask[:, 0].to(torch.bool).all())
        longest = length if dense else int(cu_seqlens.diff().max())
    else:
        tokens, longest, first, classes = measure(mask)
        indices, cu_seqlens, order = ops.unpad(mask, tokens)
        work = order, classes
    packed = indices if indices.shape[0] < batch * length else None
    return Packing(cu_seqlens, longest, batch, length, packed, *work), first


def measure(mask: Tensor) -> tuple[int, int, bool, tuple[int, ...]]:
    """mask [B, S] → T, the longest sequence, whether column 0 is real in every row, how many rows each class of lengths
    holds (`Packing.classes`): one read by the host.
    """
    real = mask.to(torch.bool)
    lengths = real.sum(1)
    within = (lengths[:, None] <= class_bounds(mask.device)).sum(0)  # how many have at most so many tokens
    found = torch.cat([torch.stack([lengths.sum(), lengths.max(), real[:, 0].all().long()]), within]).tolist()
    tokens, longest, first, *counts = found
    classes = tuple(end - start for start, end in itertools.pairwise((0, *counts, mask.shape[0])))
    return tokens, longest, bool(first), classes


@functools.cache
def class_bounds(device: torch.device) -> Tensor:
    """The longest length of each class but the last [4], on a device: made once, not copied to it at every batch."""
    return torch.tensor(ops.LENGTH_CLASSES, device=device)


def pack_dense(batch: int, length: int, device: torch.device) -> Packing:
    """The packing of a batch without padding."""
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return Packing(cu_seqlens, length, batch, length)


@dataclass(frozen=True, slots=True)
class Product:
    """A linear map as the ops take it, or modules of a user (LoRA) that are called on packed tokens instead.

    Args:
        weight: [N, K], or packed by `ops.pack_weight`.
        bias: [N].
        modules: called one by one, their outputs [T, N_i] side by side; then there is no weight.
    """

    weight: Tensor | PackedWeight | None
    bias: Tensor | None = None
    modules: tuple[nn.Module, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] → [T, N]."""
        if self.modules:
            return torch.cat([module(x) for module in self.modules], 1)
        return ops.linear(x, self.weight, self.bias)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class QuantizedProduct:
    """A linear map in int8, as `ops.quantized_linear` takes it.

    Args:
        weight: [N, K] int8, with scales [N].
        bias: [N].
        columns: [C], multiplied with outliers [N, C].
        rotated: how many columns a block of the rotation has.
    """

    weight: Tensor | PackedWeight
    scales: Tensor
    bias: Tensor | None
    columns: Tensor
    outliers: Tensor | PackedWeight
    rotated: int

    def __call__(self, x: Tensor, activation: str = "") -> Tensor:
        """x [T, K] → [T, N]; activation: GELU as `approximate` says, or ""."""
        weights = self.weight, self.scales, self.bias, self.columns, self.outliers, self.rotated
        return ops.quantized_linear(x, *weights, activation)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's parameters as the ops take them.

    Args:
        dropout: the probabilities at the places of ops/dropout.py: attention probabilities, attention output,
            feed-forward output; () stands for none.
        index: the number of the layer.
        save: the feed-forward keeps its pre-activation for the backward.
    """

    heads: int
    scale: float
    approximate: str
    qkv: Product | QuantizedProduct  # [3·N·D, H]
    out: Product | QuantizedProduct  # [H, N·D]
    norm1: tuple[Tensor, Tensor, float]  # gamma [H], beta [H], eps
    first: Product | QuantizedProduct  # [I, H]
    second: Product | QuantizedProduct  # [H, I]
    norm2: tuple[Tensor, Tensor, float]
    dropout: tuple[float, ...] = ()
    index: int = 0
    save: bool = False


def attend(x: Tensor, weights: LayerWeights, packing: Packing, seed: Tensor | None) -> Tensor:
    """x [T, H] → self-attention with its output projection [T, H], before dropout, residual and LayerNorm."""
    product, bias = without_gradient(weights.qkv)
    heads = (3, weights.heads, -1)
    qkv = product(x).unflatten(1, heads)  # type: ignore[no-untyped-call]  # [T, 3, N, D]
    bits, p = keep_bits(weights, packing, x.shape[0], seed)
    rest = packing.order, packing.classes, bias if bias is None else bias.unflatten(0, heads)  # type: ignore[no-untyped-call]
    out, _ = ops.attention(qkv, packing.cu_seqlens, packing.max_seqlen, weights.scale, bits, p, *rest)
    return weights.out(out.flatten(1))


def without_gradient(product: Product | QuantizedProduct) -> tuple[Product | QuantizedProduct, Tensor | None]:
    """The product with a bias that gets no gradient, and that bias if it is to get one: the op behind gives it."""
    bias = product.bias
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return product, None
    return dataclasses.replace(product, bias=bias.detach()), bias


def feed_forward(x: Tensor, weights: LayerWeights) -> Tensor:
    """x [T, H] → both products with GELU between them [T, H], before dropout, residual and LayerNorm."""
    first, second = weights.first, weights.second
    if isinstance(first, QuantizedProduct):
        return second(first(x, weights.approximate))
    if isinstance(second, QuantizedProduct) or first.modules or second.modules:
        return second(F.gelu(first(x), approximate=weights.approximate))
    return ops.feed_forward(  # type: ignore[no-any-return]
        x, first.weight, first.bias, second.weight, second.bias, weights.approximate, weights.save
    )[0]


def layer(x: Tensor, weights: LayerWeights, packing: Packing, dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    """x [T, H] → [T, H]. Products run in `dtype` (autocast's, if it is on); residual and LayerNorm in x's.

    seed: [] int64 on the device, what decides which elements are dropped; None: there is no dropout.
    """
    after_attention, after_feed_forward = (dropout(weights, p, seed) for p in (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT))
    norm1, norm2 = (in_dtype(norm, x.dtype) for norm in (weights.norm1, weights.norm2))
    h = ops.add_layer_norm(attend(x.to(dtype), weights, packing, seed), None, x, *norm1, *after_attention)[0]
    return ops.add_layer_norm(feed_forward(h.to(dtype), weights), None, h, *norm2, *after_feed_forward)[0]  # type: ignore[no-any-return]


def in_dtype(norm: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """gamma and beta in the dtype of what is normalized: kernels take no two."""
    gamma, beta, eps = norm
    return (gamma, beta, eps) if gamma.dtype == dtype else (gamma.to(dtype), beta.to(dtype), eps)


def dropout(weights: LayerWeights, place: int, seed: Tensor | None) -> tuple[Any, ...]:
    """p, seed and site of hidden dropout at a place of the layer, as the ops take them; () where there is none."""
    if seed is None or not weights.dropout or not weights.dropout[place]:
        return ()
    return weights.dropout[place], seed, site_of(weights.index, place)


def keep_bits(weights: LayerWeights, packing: Packing, tokens: int, seed: Tensor | None) -> tuple[Tensor | None, float]:
    """The keep bits of the attention probabilities and p, as the op takes them."""
    if not (arguments := dropout(weights, ATTENTION_PROBABILITIES, seed)):
        return None, 0.0
    p, seed, site = arguments
    return ops.dropout_bits(seed, site, packing.cu_seqlens, tokens, packing.max_seqlen, weights.heads, p), p
