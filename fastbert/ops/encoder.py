"""A stack of layers, of the ops of one backend: what `encoder_forward` is in those that have no kernel of its own.

T real tokens, H hidden size, N heads, D head dim, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.ops.packed import Pack, PanelWeight, from_panels

# Of a layer: weight, scales, sums and bias of the products QKV [3·N·D, H] and out [H, N·D]; gamma and beta [H]; the
# same four of the feed-forward's products [I, H] and [H, I]; gamma and beta [H]. A weight may stand in panels; scales
# and sums are those of int8 weights, else empty.
TENSORS = 20
WEIGHTS = (0, 4, 10, 14)
NORMS = (8, 9, 18, 19)  # gammas and betas


def packed_layers(tensors: Sequence[Tensor], pack: Pack) -> list[Tensor]:
    """The tensors with their plain weights in panels, as `pack` makes them; itself where it makes none."""
    found = list(tensors)
    for i, tensor in enumerate(tensors):
        if i % TENSORS in WEIGHTS and tensor.dim() == 2:
            packed = pack(tensor)
            found[i] = packed.panels if isinstance(packed, PanelWeight) else tensor
    return found


def layers_of(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The tensors of each layer."""
    return (tensors[start : start + TENSORS] for start in range(0, len(tensors), TENSORS))


def encode(
    by: Any, dtype: torch.dtype, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int,
    scale: float, eps: float, approximate: str,
) -> Tensor:  # fmt: skip
    """x [T, H] → [T, H] behind all layers, in x's dtype; products and attention in `dtype`; by: a backend's module."""
    for layer in layers_of(tensors):
        hidden = x.shape[1]
        qkv, out, first, second = (
            (plain(layer[place], layer[place + 3], width).to(dtype), layer[place + 3].to(dtype))
            for place, width in ((0, hidden), (4, layer[3].shape[0] // 3), (10, hidden), (14, layer[13].shape[0]))
        )
        gains = [layer[place].to(x.dtype) for place in NORMS]
        rows = by.linear(x.to(dtype), *qkv).unflatten(1, (3, heads, -1))
        context = by.attention(rows, cu_seqlens, max_seqlen, scale)[0].flatten(1)
        h = by.add_layer_norm(by.linear(context, *out), None, x, *gains[:2], eps)[0]
        x = by.add_layer_norm(by.feed_forward(h.to(dtype), *first, *second, approximate)[0], None, h, *gains[2:], eps)[
            0
        ]
    return x


def plain(weight: Tensor, bias: Tensor, inner: int) -> Tensor:
    """A weight [N, inner], taken out of its panels if it stands in them."""
    return weight if weight.dim() == 2 else from_panels(weight, (bias.shape[0], inner))
