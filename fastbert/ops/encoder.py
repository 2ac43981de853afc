"""A stack of layers, of the ops of one backend: what `encoder_forward` is in those that have no kernel of its own.

T real tokens, H hidden size, N heads, D head dim, I intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.packed import Pack, PanelWeight, from_panels

# Of a layer: the products QKV [3·N·D, H] and out [H, N·D]; gamma and beta [H]; the feed-forward's products [I, H] and
# [H, I]; gamma and beta [H]. Of a product: its weight, plain or in panels; of an int8 weight, else empty, its scales
# [N], the sums of its rows [N] int32, the columns of its input [C] that are multiplied with outliers [N, C] bf16, in
# panels as the weight is; its bias [N].
TENSORS = 28
WEIGHTS = (0, 6, 14, 20)
BIAS = 5  # behind a weight
NORMS = (12, 13, 26, 27)  # gammas and betas
ROTATED = 128  # columns of an int8 product are rotated in blocks of at most so many


def packed_layers(tensors: Sequence[Tensor], pack: Pack) -> list[Tensor]:
    """The tensors with their plain weights in panels, as `pack` makes them; as they are where it makes none."""
    found = list(tensors)
    for start in range(0, len(found), TENSORS):
        for place in WEIGHTS:
            weight, *_, outliers, _ = found[start + place : start + place + BIAS + 1]
            for i, tensor in ((0, weight), (BIAS - 1, outliers)):
                if tensor.dim() == 2 and isinstance(packed := pack(tensor), PanelWeight):
                    found[start + place + i] = packed.panels
    return found


def encode(
    by: Any, dtype: torch.dtype, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int,
    scale: float, eps: float, approximate: str,
) -> Tensor:  # fmt: skip
    """x [T, H] → [T, H] behind all layers, in x's dtype; products and attention in `dtype`; by: a backend's module."""
    for start in range(0, len(tensors), TENSORS):
        layer = tensors[start : start + TENSORS]
        qkv, out, first, second = (layer[place : place + BIAS + 1] for place in WEIGHTS)
        gamma1, beta1, gamma2, beta2 = (layer[place].to(x.dtype) for place in NORMS)
        rows = multiply(by, x.to(dtype), qkv).unflatten(1, (3, heads, -1))  # type: ignore[no-untyped-call]
        context = by.attention(rows, cu_seqlens, max_seqlen, scale)[0].flatten(1)
        h = by.add_layer_norm(multiply(by, context, out), None, x, gamma1, beta1, eps)[0]
        y = multiply(by, multiply(by, h.to(dtype), first, approximate), second)
        x = by.add_layer_norm(y, None, h, gamma2, beta2, eps)[0]
    return x


def multiply(by: Any, x: Tensor, product: Sequence[Tensor], activation: str = "") -> Tensor:
    """x [T, K] → x·weightᵀ + bias [T, N] of the six tensors of a product; activation: as in `quantized_linear`."""
    weight, scales, _, columns, outliers, bias = product
    weight, outliers = plain(weight, bias, x.shape[1]), plain(outliers, bias, columns.shape[0])
    if weight.dtype == torch.int8:
        rotated = math.gcd(x.shape[1], ROTATED)
        return by.quantized_linear(x, weight, scales, bias, columns, outliers, rotated, activation)  # type: ignore[no-any-return]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if activation:
        return by.linear_gelu(x, weight, bias, activation)[0]  # type: ignore[no-any-return]
    return by.linear(x, weight, bias)  # type: ignore[no-any-return]


def plain(weight: Tensor, bias: Tensor, inner: int) -> Tensor:
    """A weight [N, inner], taken out of its panels if it stands in them."""
    return from_panels(weight, (bias.shape[0], inner)) if weight.dim() == 4 else weight
