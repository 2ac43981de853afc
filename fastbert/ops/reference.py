"""The ops' specification: plain PyTorch in float64, rounded once at the end. Nothing here is fast.

T real tokens, B sequences, H hidden size, N heads, D head dim, I intermediate size. An op's backward stands behind it;
of its gradients it returns those that are `needed`, and an empty tensor for each of the others.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.ops.dropout import EMBEDDINGS, keep_bytes, keep_rows, keep_scale
from fastbert.ops.encoder import encode
from fastbert.ops.packed import PackedWeight

LENGTH_CLASSES = (64, 128, 256, 512)  # the longest sequence of each class of lengths; a last class holds longer ones


def up(x: Tensor | PackedWeight) -> Tensor:
    """x in the precision that the reference computes in."""
    return (x.to_dense() if isinstance(x, PackedWeight) else x).double()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of saved statistics (lse, mean, rstd): fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unpad(mask: Tensor, tokens: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """mask [B, S], nonzero = real → indices [T] int64 into B·S, cu_seqlens [B+1] int32, order [B] int32.

    order: the sequences, longest first, those of equal length as they stand. tokens: T, where the host knows it: a
    backend need not wait for the device to learn it; -1: it is not known.
    """
    real = mask.to(torch.bool)
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    order = torch.argsort(real.sum(1), descending=True, stable=True).to(torch.int32)
    return real.flatten().nonzero().flatten(), cu_seqlens, order


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """x [T, H] → [B, S, H]; rows that are not in `indices` are exact zeros."""
    out = x.new_zeros(batch, length, x.shape[1])
    out.view(-1, x.shape[1])[indices] = x
    return out


def pad_backward(grad: Tensor, indices: Tensor) -> Tensor:
    """grad [B, S, H] → its rows at `indices` [T, H]."""
    return grad.flatten(0, 1)[indices]


def only(needed: list[bool], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Those gradients that are needed, and an empty tensor for each of the others."""
    return tuple(g if wanted else g.new_empty(0) for g, wanted in zip(gradients, needed, strict=True))


def dropout_bits(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> Tensor:
    """seed [] int64 → keep bits of attention probabilities [N, T, ⌈max_seqlen/32⌉] int32, 0 past a sequence's end."""
    lengths = cu_seqlens.diff().long().repeat_interleave(cu_seqlens.diff().long(), output_size=tokens)  # [T]
    rows, head = (torch.arange(n, device=seed.device) for n in (tokens, heads))
    packed = keep_bytes(seed, site, rows, -(-max_seqlen // 32) * 32, head, p)  # [N, T, 4·W]
    left = (lengths[:, None] - 8 * torch.arange(packed.shape[2], device=seed.device)).clamp(0, 8)
    kept = packed & ((1 << left) - 1).byte()
    return kept.flatten().view(torch.int32).view(heads, tokens, -(-max_seqlen // 32))


def dropped(x: Tensor, seed: Tensor | None, site: int, p: float) -> Tensor:
    """x [T, H] after dropout; its gradient after dropout's backward, which is the same."""
    return x * keep_rows(seed, site, x.shape[0], x.shape[1], p) * keep_scale(p) if p and seed is not None else x


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H] → normalized [T, H], mean [T], rstd [T] (Ba et al. 2016, biased variance)."""
    mean = x.mean(1, keepdim=True)
    rstd = (x.sub(mean).square().mean(1, keepdim=True) + eps).rsqrt()
    return (x - mean) * rstd * up(gamma) + up(beta), mean.squeeze(1), rstd.squeeze(1)


def layer_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x [T, H] → dx [T, H], dgamma [H], dbeta [H]."""
    normalized = (x - up(mean)[:, None]) * up(rstd)[:, None]
    scaled = grad * up(gamma)
    projected = scaled.mean(1, keepdim=True) + normalized * (scaled * normalized).mean(1, keepdim=True)
    return (scaled - projected) * up(rstd)[:, None], (grad * normalized).sum(0), grad.sum(0)


def embeddings(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor,
) -> Tensor:  # fmt: skip
    """ids, types, positions [T]; tables [·, H] → the sum of their rows [T, H]."""
    x = up(words[ids]) + up(position_table[positions])
    return x + up(type_table[types]) if types is not None and type_table is not None else x


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None,
    word_padding: int = -1, position_padding: int = -1, save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ids, types, positions [T]; tables [·, H] → dropout(LayerNorm(sum of their rows)) [T, H], mean [T], rstd [T].

    Then the sum [T, H] if it is to be saved, else an empty tensor. word_padding, position_padding: the row of the
    table that gets no gradient (nn.Embedding's padding_idx); -1: none.
    """
    x = embeddings(ids, types, positions, words, type_table, position_table)
    y, mean, rstd = layer_norm(x, gamma, beta, eps)
    kind = statistics_dtype(words)
    pre = x.to(words.dtype) if save else words.new_empty(0)
    return dropped(y, seed, EMBEDDINGS, p).to(words.dtype), mean.to(kind), rstd.to(kind), pre


def embed_layer_norm_backward(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, p: float, seed: Tensor | None,
    word_padding: int, position_padding: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad [T, H] → the gradients of words, type_table, position_table, gamma, beta; no `pre`: gathered again."""
    x = up(pre) if pre.dim() == 2 else embeddings(ids, types, positions, words, type_table, position_table)
    dx, dgamma, dbeta = layer_norm_backward(dropped(up(grad), seed, EMBEDDINGS, p), x, gamma, mean, rstd)
    dwords = rows_added(dx, ids, words, word_padding)
    dpositions = rows_added(dx, positions, position_table, position_padding)
    dtypes = words.new_empty(0) if types is None or type_table is None else rows_added(dx, types, type_table, -1)
    return only(needed, dwords, dtypes, dpositions, dgamma.to(gamma.dtype), dbeta.to(gamma.dtype))


def rows_added(rows: Tensor, indices: Tensor, table: Tensor, padding: int) -> Tensor:
    """rows [T, H] added up at `indices` of a table [·, H] of zeros; row `padding` stays zero (-1: none)."""
    out = torch.zeros_like(table, dtype=rows.dtype).index_add_(0, indices, rows)
    if padding >= 0:
        out[padding] = 0
    return out.to(table.dtype)


def keep_mask(keep_bits: Tensor, length: int) -> Tensor:
    """keep_bits [..., W] int32, bit k of word w is key 32·w + k → bool [..., length]."""
    bits = keep_bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=keep_bits.device)
    return (bits & 1).flatten(-2)[..., :length] != 0


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """qkv [T, 3, N, D] → out [T, N, D], lse [N, T]: softmax(q·kᵀ·scale)·v inside each sequence, no causal mask.

    order [B], classes: the sequences longest first, and how many there are in each class of lengths, by which a kernel
    may divide its work; what comes out does not depend on them. bias [3, N, D]: what every row of qkv holds already,
    given for its gradient alone, the sum of the rows' gradients.
    """
    out, lse = torch.empty_like(qkv[:, 0]), qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=statistics_dtype(qkv))
    wide = up(qkv) if bias is None else up(qkv) + (up(bias) - up(bias).detach())
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        query, key, value = wide[start:end].permute(1, 2, 0, 3)  # [N, L, D]
        scores = query @ key.transpose(1, 2) * scale  # [N, L, L]
        lse[:, start:end] = scores.logsumexp(2)
        probabilities = scores.softmax(2)
        if keep_bits is not None:
            probabilities = probabilities * keep_mask(keep_bits[:, start:end], end - start) * keep_scale(p)
        out[start:end] = (probabilities @ value).transpose(0, 1).to(qkv.dtype)
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    keep_bits: Tensor | None, p: float, order: Tensor | None, classes: Sequence[int], needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad, out [T, N, D], lse [N, T] → dqkv [T, 3, N, D] (Dao et al. 2022, "FlashAttention", algorithm 4), dbias."""
    dqkv = torch.empty_like(up(qkv))
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        query, key, value = up(qkv[start:end]).permute(1, 2, 0, 3)  # [N, L, D]
        dout, o = (up(x[start:end]).transpose(0, 1) for x in (grad, out))
        probabilities = (query @ key.mT * scale - up(lse[:, start:end, None])).exp()  # [N, L, L]
        kept = probabilities.new_ones(())
        if keep_bits is not None:
            kept = up(keep_mask(keep_bits[:, start:end], end - start)) * keep_scale(p)
        dscores = probabilities * (dout @ value.mT * kept - (dout * o).sum(2, keepdim=True)) * scale
        parts = dscores @ key, dscores.mT @ query, (probabilities * kept).mT @ dout
        dqkv[start:end] = torch.stack(parts).permute(2, 0, 1, 3)
    return only(needed, dqkv.to(qkv.dtype), dqkv.sum(0).to(qkv.dtype))


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
    seed: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual [T, H] → LayerNorm(residual + dropout(x + bias)) in the residual's dtype, mean [T], rstd [T]."""
    total = up(residual) + dropped(up(x) + (up(bias) if bias is not None else 0), seed, site, p)
    y, mean, rstd = layer_norm(total, gamma, beta, eps)
    return y.to(residual.dtype), mean.to(statistics_dtype(residual)), rstd.to(statistics_dtype(residual))


def add_layer_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Tensor | None, site: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad [T, H] → the gradients of x, bias, residual, gamma, beta."""
    total = up(residual) + dropped(up(x) + (up(bias) if bias is not None else 0), seed, site, p)
    dtotal, dgamma, dbeta = layer_norm_backward(up(grad), total, gamma, mean, rstd)
    dx = dropped(dtotal, seed, site, p)
    dbias = x.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)
    like = x.dtype, residual.dtype, gamma.dtype
    dx, dtotal, dgamma, dbeta = dx.to(like[0]), dtotal.to(like[1]), dgamma.to(like[2]), dbeta.to(like[2])
    return only(needed, dx, dbias, dtotal.clone(), dgamma, dbeta)  # no two outputs share memory


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] → x·weightᵀ + bias [T, N]."""
    y = up(x) @ up(weight).T
    return (y + up(bias) if bias is not None else y).to(x.dtype)


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    """grad [T, N] → the gradients of x, weight, bias."""
    dx, dweight, dbias = up(grad) @ up(weight), up(grad).T @ up(x), up(grad).sum(0)
    return only(needed, dx.to(x.dtype), dweight.to(x.dtype), dbias.to(x.dtype))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x·Φ(x), by erf ("none") or by tanh ("tanh") (Hendrycks & Gimpel 2016)."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x * 0.5**0.5)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """The gradient of x: grad·(Φ(x) + x·φ(x)), or its tanh form."""
    slope: Tensor = 0.5 * torch.erfc(-x * 0.5**0.5) + x * torch.exp(-0.5 * x**2) * (2 * torch.pi) ** -0.5
    if approximate == "tanh":
        tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * x**2)
    return grad * slope


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """x [T, I], bias [I] → gelu(x + bias) [T, I]."""
    return gelu(up(x) + (up(bias) if bias is not None else 0), approximate).to(x.dtype)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    """grad [T, I] → the gradients of x, bias."""
    dx = gelu_backward(up(grad), up(x) + (up(bias) if bias is not None else 0), approximate)
    dbias = x.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)
    return only(needed, dx.to(x.dtype), dbias)


def linear_gelu(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> tuple[Tensor, Tensor]:
    """x [T, K] → gelu(x·weightᵀ + bias) [T, N], and x·weightᵀ + bias if it is to be saved, else an empty tensor."""
    pre = linear(up(x), weight, bias)
    return gelu(pre, approximate).to(x.dtype), pre.to(x.dtype) if save else x.new_empty(0)


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    """grad [T, N] → the gradients of x, weight, bias; an empty `pre` is computed again."""
    pre = up(pre) if pre.dim() == 2 else linear(up(x), weight, bias)
    dx, dweight, dbias = linear_backward(gelu_backward(up(grad), pre, approximate), up(x), weight, [True] * 3)
    return only(needed, dx.to(x.dtype), dweight.to(x.dtype), dbias.to(x.dtype))


def feed_forward(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none", save: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [T, H], w1 [I, H], w2 [H, I] → gelu(x·w1ᵀ + b1)·w2ᵀ + b2 [T, H], and x·w1ᵀ + b1 [T, I] as in `linear_gelu`."""
    inner, pre = linear_gelu(up(x), w1, b1, approximate, save)
    return linear(inner, w2, b2).to(x.dtype), pre.to(x.dtype)


def feed_forward_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad [T, H] → the gradients of x, w1, b1, w2, b2; an empty `pre` is computed again."""
    pre = up(pre) if pre.dim() == 2 else linear(up(x), w1, b1)
    dinner, dw2, db2 = linear_backward(up(grad), gelu(pre, approximate), up(w2), [True] * 3)
    dx, dw1, db1 = linear_gelu_backward(dinner, up(x), up(w1), None, pre, approximate, [True] * 3)
    return only(needed, *(g.to(x.dtype) for g in (dx, dw1, db1, dw2, db2)))


def encoder_forward(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    """x [T, H] → [T, H] behind a stack of layers; tensors: of each layer as in `ops/encoder.py`."""
    by = sys.modules[__name__]
    arguments = cu_seqlens, max_seqlen, tensors, heads, scale, eps, approximate
    return encode(by, torch.float64, up(x), *arguments).to(x.dtype)


def rotate(x: Tensor, width: int) -> Tensor:
    """x [..., K] → its Walsh-Hadamard transform in blocks of `width`, unscaled: twice gives width · x.

    It spreads what is large in one column over its block (Ashkboos et al. 2024, "QuaRot"). Sums of two alone, in this
    order, so that they are the same bits everywhere.
    """
    half = 1
    while half < width:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)  # type: ignore[no-untyped-call]
        x, half = torch.stack((a + b, a - b), -2).flatten(-3), 2 * half
    return x


def quantize_rows(x: Tensor, columns: Tensor | None = None, rotated: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, K] → u8 [T, K], scale [T] fp32: scale · (u8 - 128) is about x, rotated; in fp32 arithmetic.

    A row's greatest magnitude is 127 steps; halves go to the even one. `columns` [C] are taken for 0. A row that is not
    finite gets the scale NaN and zeros (128).
    """
    x = rotate(x.float() if columns is None else x.float().index_fill(1, columns, 0.0), rotated)
    scale = (x.abs().amax(1) / 127).clamp(min=2.0**-126)  # its reciprocal is finite
    scale = scale.where(x.isfinite().all(1), torch.nan)
    steps = (x * (1 / scale)[:, None]).nan_to_num(0).round().clamp(-127, 127)
    return (steps + 128).to(torch.uint8), scale


def quantized_linear(
    x: Tensor, weight: Tensor | PackedWeight, scales: Tensor, bias: Tensor | None = None,
    columns: Tensor | None = None, outliers: Tensor | PackedWeight | None = None, rotated: int = 1,
    activation: str = "",
) -> Tensor:  # fmt: skip
    """x [T, K], weight [N, K] int8, scales, bias [N] → q(x)·(scales·weight)ᵀ + x[:, columns]·outliersᵀ + bias [T, N].

    q: `quantize_rows`, which leaves out columns [C] and rotates blocks of `rotated`. Those columns are rounded to bf16
    as outliers [N, C] are (Dettmers et al. 2022, "LLM.int8()"). activation: "", or GELU by erf ("none") or "tanh".
    """
    quantized, scale = quantize_rows(x, columns, rotated)
    sums = (quantized.double() - 128) @ up(weight).T  # [T, N], integers
    y = sums * up(scale)[:, None] * up(scales)
    if columns is not None and outliers is not None:
        y = y + up(x[:, columns].to(torch.bfloat16)) @ up(outliers).T
    y = y if bias is None else y + up(bias)
    return (gelu(y, activation) if activation else y).to(x.dtype)
