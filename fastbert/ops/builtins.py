"""Backend "torch": the ops by PyTorch's built-ins, on any device.

On a CPU the products run by oneDNN on packed weights with GELU as their post-op, and attention by torch's flash kernel,
where `torch_private` finds them; elsewhere by the plain built-ins.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import torch_private as private
from fastbert.ops.dropout import (
    EMBEDDINGS,
    PER_COUNTER,
    blocks,
    keep_bytes,
    keep_rows,
    keep_scale,
    kept,
)
from fastbert.ops.encoder import BIAS, encode
from fastbert.ops.packed import OneDNNWeight, PackedWeight
from fastbert.ops.reference import keep_mask, only, statistics_dtype

SUMMED_COLUMNS = 192  # oneDNN adds products one after the other: over more of them fp32 is less exact than MKL
FEW_ROWS, FEW_COLUMNS = 3, 512  # up to here MKL adds in another order, and is more exact still
NARROW = 16  # columns of a product from which oneDNN's fp32 kernels are as exact as they are for wide ones
SHORT_ROWS, MANY_PARTS = 16, 8  # up to so few rows MKL's one product is faster than so many
EXACT_COLUMNS = 1024  # 1024 · 128 · 128 = 2^24: fp32 adds up so many products of int8 without rounding
ROWS = 64  # of a product whose bits must not depend on how many rows there are
BLOCK_ROWS = 512  # of [T, N] sums that should stay in a CPU's cache


def unpad(mask: Tensor, tokens: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    real = mask.to(torch.bool)
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return places(real, tokens), cu_seqlens, longest_first(cu_seqlens)


def longest_first(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens [B+1] → the sequences [B] int32, longest first, those of equal length as they stand."""
    return torch.argsort(cu_seqlens.diff(), descending=True, stable=True).to(torch.int32)


def places(real: Tensor, tokens: int) -> Tensor:
    """real [B, S] → where it holds [T] in B·S; tokens: T, or -1: the host waits for the device to learn it."""
    flat = real.flatten()
    return (flat.nonzero() if tokens < 0 else flat.nonzero_static(size=tokens)).flatten()


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch, length, x.shape[1])
    out.view(-1, x.shape[1]).index_copy_(0, indices.long(), x)
    return out


def pad_backward(grad: Tensor, indices: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[2]).index_select(0, indices)


def embeddings(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor,
) -> Tensor:  # fmt: skip
    """The sum of the tables' rows [T, H], before LayerNorm."""
    x = F.embedding(ids, words)
    if types is not None and type_table is not None:
        x = x + F.embedding(types, type_table)
    return x + F.embedding(positions, position_table)


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None,
    word_padding: int = -1, position_padding: int = -1, save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = embeddings(ids, types, positions, words, type_table, position_table)
    y, mean, rstd = layer_norm(x, gamma, beta, eps)
    keep = None if seed is None else keep_rows(seed, EMBEDDINGS, y.shape[0], y.shape[1], p)
    return kept(y, keep, p), mean, rstd, x if save else x.new_empty(0)


def embed_layer_norm_backward(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, p: float, seed: Tensor | None,
    word_padding: int, position_padding: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    x = pre if pre.dim() == 2 else embeddings(ids, types, positions, words, type_table, position_table)
    keep = None if seed is None else keep_rows(seed, EMBEDDINGS, grad.shape[0], grad.shape[1], p)
    grad = kept(grad, keep, p)
    wanted = any(needed[:3]), needed[3], needed[4]
    dx, dgamma, dbeta = layer_norm_backward(grad, x, gamma, mean, rstd, wanted)

    def rows_added(want: bool, indices: Tensor | None, table: Tensor | None, padding: int) -> Tensor:
        """dx [T, H] added up by row of a table, in the dtype of statistics."""
        if not want or indices is None or table is None:
            return (words if table is None else table).new_empty(0)
        rows = dx.to(statistics_dtype(dx))
        sums: Tensor = torch.ops.aten.embedding_dense_backward(rows, indices, table.shape[0], padding, False)
        return sums.to(table.dtype)

    dwords = rows_added(needed[0], ids, words, word_padding)
    dtypes = rows_added(needed[1], types, type_table, -1)
    dpositions = rows_added(needed[2], positions, position_table, position_padding)
    return dwords, dtypes, dpositions, dgamma, dbeta


def dropout_bits(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> Tensor:
    device = seed.device
    lengths = cu_seqlens.diff().long()
    lengths = lengths.repeat_interleave(lengths, output_size=tokens)  # [T]
    width = -(-max_seqlen // 32) * 4
    out = torch.zeros(heads, tokens, width, dtype=torch.uint8, device=device)
    first, head = torch.arange(width, device=device) * PER_COUNTER, torch.arange(heads, device=device)
    whole = (slice(0, tokens), 1, max_seqlen)
    for rows, _, length in runs(cu_seqlens) if device.type == "cpu" else (whole,):
        counters = -(-length // PER_COUNTER)
        for start, end in blocks(rows.stop - rows.start, counters * heads):
            start, end = rows.start + start, rows.start + end
            packed = keep_bytes(seed, site, torch.arange(start, end, device=device), length, head, p)
            inside = (1 << (lengths[start:end, None] - first[:counters]).clamp(0, 8)) - 1
            torch.bitwise_and(packed, inside.byte(), out=out[:, start:end, :counters])
    return out.flatten().view(torch.int32).view(heads, tokens, width // 4)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if keep_bits is None and not refuse_varlen(qkv):
        query, key, value = qkv.unbind(1)
        return private.varlen_attention(query, key, value, cu_seqlens, max_seqlen, scale)
    if qkv.device.type != "cpu":
        return attention_padded(qkv, cu_seqlens, max_seqlen, scale, keep_bits, p)
    tokens, _, heads, dim = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=statistics_dtype(qkv))
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()  # the flash kernel takes the last stride for 1
    flash = keep_bits is None and private.cpu_flash_refusal(qkv.dtype) is None
    for rows, count, length in runs(cu_seqlens):
        query, key, value = qkv[rows].view(count, length, 3, heads, dim).permute(2, 0, 3, 1, 4)  # [B, N, L, D]
        if flash:
            part, part_lse = private.cpu_flash_attention(query, key, value, scale)
        else:
            keep = keep_of(keep_bits, rows, count, length)
            part, part_lse = attend(query, key, value, scale, keep, p)
        out[rows].view(count, length, heads, dim).copy_(part.transpose(1, 2))
        lse[:, rows].view(heads, count, length).copy_(part_lse.transpose(0, 1))
    return out, lse


def refuse_varlen(qkv: Tensor) -> list[str]:
    """Why torch's varlen attention cannot take this qkv."""
    reasons = [] if qkv.device.type == "cuda" else [f"device {qkv.device.type} is not cuda"]
    reasons += [] if qkv.dtype in (torch.float16, torch.bfloat16) else [f"{qkv.dtype} is not 16-bit"]
    dim = qkv.shape[3]
    reasons += [] if dim % 8 == 0 and dim <= 256 else [f"head dim {dim} is no multiple of 8 up to 256"]
    missing = None if reasons else private.varlen_attention_refusal()  # its module takes a second to import
    return [missing] if missing else reasons


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    keep_bits: Tensor | None, p: float, order: Tensor | None, classes: Sequence[int], needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    if qkv.device.type != "cpu":
        dqkv = attention_padded_backward(grad, qkv, cu_seqlens, max_seqlen, scale, keep_bits, p)
    else:
        dqkv = attention_runs_backward(grad, qkv, out, lse, cu_seqlens, scale, keep_bits, p)
    empty = qkv.new_empty(0)
    return dqkv if needed[0] else empty, dqkv.sum(0) if needed[1] else empty.clone()


def attention_runs_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float, keep_bits: Tensor | None,
    p: float,
) -> Tensor:  # fmt: skip
    """Neighbours of equal length together, on a CPU."""
    heads, dim = qkv.shape[2:]
    dqkv = qkv.new_empty(qkv.shape)
    qkv, grad = qkv.contiguous(), grad.contiguous()
    flash = keep_bits is None and private.cpu_flash_refusal(qkv.dtype) is None
    if flash:  # which is slower and less exact in 16 bits
        qkv, grad, out = (x.to(statistics_dtype(x)) for x in (qkv, grad, out))
    for rows, count, length in runs(cu_seqlens):
        query, key, value = qkv[rows].view(count, length, 3, heads, dim).permute(2, 0, 3, 1, 4)  # [B, N, L, D]
        dout, o = (x[rows].view(count, length, heads, dim).transpose(1, 2) for x in (grad, out))
        part_lse = lse[:, rows].view(heads, count, length).transpose(0, 1)  # [B, N, L]
        if flash:
            parts = private.cpu_flash_attention_backward(dout, query, key, value, o, part_lse, scale)
        else:
            keep = keep_of(keep_bits, rows, count, length)
            parts = attend_backward(dout, query, key, value, scale, keep, p)
        for place, part in enumerate(parts):
            dqkv[rows, place].view(count, length, heads, dim).copy_(part.transpose(1, 2))
    return dqkv


def runs(cu_seqlens: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Neighbours of equal length: their rows, how many they are, their length. Reads cu_seqlens on the host."""
    start = 0
    for length, run in itertools.groupby(end - begin for begin, end in itertools.pairwise(cu_seqlens.tolist())):
        count = sum(1 for _ in run)
        end = start + count * length
        if length:
            yield slice(start, end), count, length
        start = end


def keep_of(keep_bits: Tensor | None, rows: slice, count: int, length: int) -> Tensor | None:
    """keep_bits [N, T, W] → which probabilities of a run are kept: bool [B, N, L, L]."""
    if keep_bits is None:
        return None
    mine = keep_bits[:, rows].view(keep_bits.shape[0], count, length, -1)  # [N, B, L, W]
    return keep_mask(mine, length).transpose(0, 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, keep: Tensor | None, p: float, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """query, key, value [B, N, L, D]; keep [B, N, L, L]; real [B, L], which keys there are → out [B, N, L, D], lse."""
    wide = statistics_dtype(query)
    scores = masked_scores(query.to(wide), key.to(wide), scale, real)
    probabilities = scores.softmax(3)
    if keep is not None:
        probabilities = probabilities * keep * keep_scale(p)
    return probabilities.to(value.dtype) @ value, scores.logsumexp(3)  # [B, N, L]


def masked_scores(query: Tensor, key: Tensor, scale: float, real: Tensor | None) -> Tensor:
    """query, key [B, N, L, D] → scores [B, N, L, L], -inf for keys that there are not."""
    scores = query @ key.mT * scale
    return scores if real is None else scores.masked_fill(~real[:, None, None], -torch.inf)


def attend_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, keep: Tensor | None, p: float,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients [B, N, L, D] of query, key and value; dout is 0 in rows that there are not.

    The probabilities are computed again, by softmax: from the rounded lse they would be less exact.
    """
    wide = statistics_dtype(query)
    query, key, value, dout = (x.to(wide) for x in (query, key, value, dout))
    probabilities = masked_scores(query, key, scale, real).softmax(3)
    dprobabilities = dout @ value.mT
    dropped = probabilities
    if keep is not None:
        factor = keep.to(wide) * keep_scale(p)
        dprobabilities, dropped = dprobabilities * factor, probabilities * factor
    products = probabilities * dprobabilities
    dscores = (products - probabilities * products.sum(3, keepdim=True)) * scale  # dout·out, without out's rounding
    return dscores @ key, dscores.mT @ query, dropped.mT @ dout


def gathered(x: Tensor, rows: Tensor, real: Tensor) -> Tensor:
    """x [T, ...] → its rows [B, S, ...], zeros in rows that there are not."""
    return x[rows].masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 1)), 0)


def padded_rows(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
    """For every sequence padded to max_seqlen: the rows of its tokens [B, S], and which of them there are [B, S]."""
    column = torch.arange(max_seqlen, device=cu_seqlens.device)
    real = column < cu_seqlens.diff().long()[:, None]
    return (cu_seqlens[:-1, None].long() + column).clamp(max=max(tokens - 1, 0)), real


def attention_padded(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """All sequences padded to the longest: any device, any dtype. Scores [B, N, S, S] in memory."""
    rows, real = padded_rows(cu_seqlens, max_seqlen, qkv.shape[0])
    query, key, value = gathered(qkv, rows, real).permute(2, 0, 3, 1, 4)  # [B, N, S, D]
    keep = None if keep_bits is None else keep_mask(keep_bits[:, rows], max_seqlen).transpose(0, 1)
    out, lse = attend(query, key, value, scale, keep, p, real)
    indices = places(real, qkv.shape[0])
    return out.transpose(1, 2).flatten(0, 1)[indices], lse.transpose(0, 1).flatten(1)[:, indices]


def attention_padded_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None, p: float
) -> Tensor:
    rows, real = padded_rows(cu_seqlens, max_seqlen, qkv.shape[0])
    query, key, value = gathered(qkv, rows, real).permute(2, 0, 3, 1, 4)  # [B, N, S, D]
    dout = gathered(grad, rows, real).transpose(1, 2)
    keep = None if keep_bits is None else keep_mask(keep_bits[:, rows], max_seqlen).transpose(0, 1)
    parts = attend_backward(dout, query, key, value, scale, keep, p, real)
    indices = places(real, qkv.shape[0])
    return torch.stack([x.to(qkv.dtype).transpose(1, 2).flatten(0, 1)[indices] for x in parts], 1)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H] → y in x's dtype, mean [T], rstd [T]."""
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        gamma, beta = gamma.float(), beta.float()  # the CPU kernel keeps mean and rstd in gamma's dtype
    elif gamma.dtype != x.dtype:
        gamma, beta = gamma.to(x.dtype), beta.to(x.dtype)
    y, mean, rstd = torch.native_layer_norm(x, gamma.shape, gamma, beta, eps)
    return y, mean.squeeze(1), rstd.squeeze(1)


def layer_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x [T, H] → dx in x's dtype, dgamma, dbeta [H] in gamma's; an empty tensor for what is not needed."""
    wide = statistics_dtype(x) if x.device.type == "cpu" else x.dtype  # the CPU kernel adds up in x's dtype
    gains = gamma.to(wide)
    gradients = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide).contiguous(), x.to(wide), gamma.shape, mean[:, None], rstd[:, None], gains, gains, needed
    )
    dx, dgamma, dbeta = (x.new_empty(0) if g is None else g for g in gradients)
    return dx.to(x.dtype), dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)


def before_norm(x: Tensor, bias: Tensor | None, residual: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x + bias) [T, H]."""
    return residual + kept(x if bias is None else x + bias, keep, p)


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
    seed: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keep = None if seed is None else keep_rows(seed, site, x.shape[0], x.shape[1], p)
    y, mean, rstd = layer_norm(before_norm(x, bias, residual, keep, p), gamma, beta, eps)
    return y.to(residual.dtype), mean, rstd


def add_layer_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Tensor | None, site: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    keep = None if seed is None else keep_rows(seed, site, x.shape[0], x.shape[1], p)
    total = before_norm(x, bias, residual, keep, p)
    wanted = any(needed[:3]), needed[3], needed[4]
    dtotal, dgamma, dbeta = layer_norm_backward(grad.to(total.dtype), total, gamma, mean, rstd, wanted)
    dx = kept(dtotal, keep, p) if any(needed[:2]) else dtotal
    dbias = x.new_empty(0) if bias is None else dx.sum(0, dtype=statistics_dtype(dx)).to(bias.dtype)
    dresidual = dtotal.clone() if dx is dtotal and needed[0] else dtotal  # no two outputs share memory
    return only(needed, dx.to(x.dtype), dbias, dresidual.to(residual.dtype), dgamma, dbeta)


def packs(device: str, dtype: torch.dtype) -> bool:
    """Whether `pack_weight` copies weights of this dtype on this type of device."""
    return device == "cpu" and private.packed_linear_refusal(dtype) is None


def pack_weight(weight: Tensor) -> Tensor | PackedWeight:
    """weight [N, K] as this backend multiplies fastest with it: oneDNN's packed copy on a CPU, else itself.

    In fp32 the copy is split into ranges of at most SUMMED_COLUMNS columns. A weight of fewer than NARROW rows is not
    packed: oneDNN's kernels for so few columns of a product are less exact.
    """
    if weight.shape[0] < NARROW or weight.numel() == 0 or not packs(weight.device.type, weight.dtype):
        return weight.detach()
    columns = weight.shape[1]
    count = -(-columns // SUMMED_COLUMNS) if weight.dtype == torch.float32 else 1
    width = -(-columns // count // 16) * 16  # [N, width]
    parts = tuple(private.pack_linear_weight(part) for part in torch.split(weight, width, 1))
    return OneDNNWeight(parts, weight.detach() if isinstance(weight, torch.nn.Parameter) else None)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, columns: int) -> Tensor:
    """function(x) [T, columns] of x [T, K], in blocks of rows."""
    out = x.new_empty(x.shape[0], columns)
    for rows, block in zip(torch.split(x, BLOCK_ROWS), torch.split(out, BLOCK_ROWS), strict=True):
        block.copy_(function(rows))
    return out


def is_summed(weight: Tensor | PackedWeight) -> bool:
    """Whether products with this weight are sums of several products."""
    return isinstance(weight, OneDNNWeight) and len(weight.parts) > 1


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, OneDNNWeight):
        return F.linear(x, plain(weight), bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if is_summed(weight) and x.shape[0] > BLOCK_ROWS:
        return by_rows(lambda rows: linear(rows, weight, bias), x, weight.shape[0])
    if weight.plain is not None and x.shape[0] <= SHORT_ROWS and len(weight.parts) >= MANY_PARTS:
        return F.linear(x, weight.plain, bias)
    if weight.dtype == torch.float32 and x.shape[0] <= FEW_ROWS and x.shape[1] < FEW_COLUMNS:
        return linear_of_few_rows(x, weight, bias)
    return sum_of_parts(x, weight, None if bias is None else bias.contiguous())


def plain(weight: Tensor | PackedWeight) -> Tensor:
    """A weight that is not packed, or that another backend packed, as it was."""
    if not isinstance(weight, PackedWeight):
        return weight
    return weight.to_dense() if weight.plain is None else weight.plain


def sum_of_parts(x: Tensor, weight: OneDNNWeight, bias: Tensor | None) -> Tensor:
    """x [T, K] → x·weightᵀ + bias [T, N], the parts' products added from left to right."""
    pieces = torch.split(x, weight.parts[0].shape[1], 1)
    y = private.packed_linear(pieces[0], weight.parts[0], bias)
    for piece, part in zip(pieces[1:], weight.parts[1:], strict=True):
        y = private.packed_linear_add(piece, part, y)
    return y


def linear_of_few_rows(x: Tensor, weight: OneDNNWeight, bias: Tensor | None) -> Tensor:
    """x [T, K] → x·weightᵀ + bias [T, N], from products over stripes of columns, added up in float64.

    Each stripe stands in a row of its own, zero elsewhere: one product reads the weight once.
    """
    columns = x.shape[1]
    width = 32 if columns < 256 else 64
    stripe = torch.arange(columns, device=x.device) // width
    own = stripe == torch.arange(-(-columns // width), device=x.device)[:, None]  # [stripes, K]
    rows = torch.where(own, x[:, None], 0.0)  # [T, stripes, K]
    y = sum_of_parts(rows.flatten(0, 1), weight, None).view(*rows.shape[:2], -1).double().sum(1)
    return (y if bias is None else y + bias).to(x.dtype)


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    return (
        grad @ weight if needed[0] else x.new_empty(0),
        grad.T @ x if needed[1] else x.new_empty(0),
        grad.sum(0) if needed[2] else x.new_empty(0),
    )


def linear_gelu(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(0)
    parts = weight.parts if isinstance(weight, OneDNNWeight) else ()
    if len(parts) == 1 and approximate == "none" and x.shape[0] > FEW_ROWS and not save:
        bias = None if bias is None else bias.contiguous()
        return private.packed_linear_gelu(x, parts[0], bias), empty
    pre = linear(x, weight, bias)
    y = F.gelu(pre, approximate=approximate)  # oneDNN's tanh is off by 5e-3 where GELU is small
    return y, pre if save else empty


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    pre = pre if pre.dim() == 2 else F.linear(x, weight, bias)
    return linear_backward(
        torch.ops.aten.gelu_backward(grad.contiguous(), pre, approximate=approximate), x, weight, needed
    )


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    pre = x if bias is None else x + bias
    dx = torch.ops.aten.gelu_backward(grad.contiguous(), pre, approximate=approximate)
    dbias = x.new_empty(0) if bias is None else dx.sum(0, dtype=statistics_dtype(dx)).to(bias.dtype)
    return only(needed, dx, dbias)


def feed_forward(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none", save: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if (is_summed(w1) or is_summed(w2)) and x.shape[0] > BLOCK_ROWS and not save:
        y = by_rows(lambda rows: feed_forward(rows, w1, b1, w2, b2, approximate)[0], x, w2.shape[0])
        return y, x.new_empty(0)
    inner, pre = linear_gelu(x, w1, b1, approximate, save)
    return linear(inner, w2, b2), pre


def feed_forward_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    pre = pre if pre.dim() == 2 else F.linear(x, w1, b1)
    inner = F.gelu(pre, approximate=approximate) if needed[3] else pre
    dinner, dw2, db2 = linear_backward(grad, inner, w2, [any(needed[:3]), *needed[3:]])
    if not any(needed[:3]):
        return dinner, x.new_empty(0), x.new_empty(0), dw2, db2
    dx, dw1, db1 = linear_gelu_backward(dinner, x, w1, b1, pre, approximate, needed[:3])
    return dx, dw1, db1, dw2, db2


def encoder_forward(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    by = sys.modules[__name__]
    arguments = cu_seqlens, max_seqlen, tensors, heads, scale, eps, approximate
    return encode(by, tensors[BIAS].dtype, x.to(statistics_dtype(x)), *arguments).to(x.dtype)


def rotate(x: Tensor, width: int) -> Tensor:
    """As the reference's: x [..., K] → its Walsh-Hadamard transform in blocks of `width`."""
    half, shape = 1, x.shape
    while half < width:
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        x, half = (
            torch.cat((pairs[..., :1, :] + pairs[..., 1:, :], pairs[..., :1, :] - pairs[..., 1:, :]), -2),
            2 * half,
        )
    return x.reshape(shape)


def quantize_rows(x: Tensor, columns: Tensor | None = None, rotated: int = 1) -> tuple[Tensor, Tensor]:
    """As the reference's, less its 128: s8 [T, K], scale [T] fp32."""
    x = rotate(x.float() if columns is None else x.float().index_fill(1, columns, 0.0), rotated)
    greatest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = (greatest / 127).clamp(min=2.0**-126).masked_fill(~(greatest < torch.inf), torch.nan)
    steps = (x * scale.reciprocal()[:, None]).nan_to_num_(0).round_().clamp_(-127, 127)
    return steps.to(torch.int8), scale


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K], both int8 → x·weightᵀ [T, N] int32, exact."""
    if x.device.type == "cpu" and private.integer_product_refusal() is None:
        return private.integer_product(x.contiguous(), weight)
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for part, columns in zip(torch.split(x, EXACT_COLUMNS, 1), torch.split(weight, EXACT_COLUMNS, 1), strict=True):
        y += (part.float() @ columns.float().T).to(torch.int32)
    return y


def few_columns(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, C], weight [N, C] → x·weightᵀ [T, N] fp32, in products of ROWS rows: a row's bits do not depend on T."""
    blocks = F.pad(x.float(), (0, 0, 0, -x.shape[0] % ROWS)).view(-1, ROWS, x.shape[1])
    y = torch.cat([F.linear(block, weight.float()) for block in blocks]) if len(blocks) else x.new_empty(0, 1)
    return y[: x.shape[0]]


def quantized_linear(
    x: Tensor, weight: Tensor | PackedWeight, scales: Tensor, bias: Tensor | None = None,
    columns: Tensor | None = None, outliers: Tensor | PackedWeight | None = None, rotated: int = 1,
    activation: str = "",
) -> Tensor:  # fmt: skip
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return x.new_empty(x.shape[0], weight.shape[0])
    weight, outliers = plain(weight), None if outliers is None else plain(outliers)
    quantized, scale = quantize_rows(x, columns, rotated)
    sums = integer_product(quantized, weight)
    y = sums * scales.float() * scale[:, None]
    if columns is not None and outliers is not None:
        y += few_columns(x.index_select(1, columns).to(torch.bfloat16), outliers)
    if bias is not None:
        y += bias.float()
    return (F.gelu(y, approximate=activation) if activation else y).to(x.dtype)
