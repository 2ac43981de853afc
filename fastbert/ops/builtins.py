"""Backend "torch": the ops by PyTorch's built-ins, on any device.

On a CPU the products run by oneDNN on packed weights with GELU as their post-op, and attention by torch's flash kernel,
where `torch_private` finds them; elsewhere by the plain built-ins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import torch_private as private
from fastbert.ops.packed import PackedWeight
from fastbert.ops.reference import keep_mask, keep_scale, statistics_dtype

SUMMED_COLUMNS = 192  # oneDNN adds products one after the other: over more of them fp32 is less exact than MKL
FEW_ROWS, FEW_COLUMNS = 3, 512  # up to here MKL adds in another order, and is more exact still
SHORT_ROWS, MANY_PARTS = 16, 8  # up to so few rows MKL's one product is faster than so many
BLOCK_ROWS = 512  # of [T, N] sums that should stay in a CPU's cache


def unpad(mask: Tensor) -> tuple[Tensor, Tensor]:
    real = mask.to(torch.bool)
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return real.flatten().nonzero().flatten(), cu_seqlens


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch * length, x.shape[1])
    return out.index_copy_(0, indices.long(), x).view(batch, length, x.shape[1])


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
) -> Tensor:  # fmt: skip
    x = F.embedding(ids, words)
    if types is not None and type_table is not None:
        x = x + F.embedding(types, type_table)
    return F.layer_norm(x + F.embedding(positions, position_table), gamma.shape, gamma, beta, eps)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    if keep_bits is None and qkv.device.type == "cpu" and private.cpu_flash_refusal(qkv.dtype) is None:
        return attention_cpu(qkv, cu_seqlens, scale)
    if keep_bits is None and not refuse_varlen(qkv):
        query, key, value = qkv.unbind(1)
        return private.varlen_attention(query, key, value, cu_seqlens, max_seqlen, scale)
    return attention_padded(qkv, cu_seqlens, max_seqlen, scale, keep_bits, p)


def refuse_varlen(qkv: Tensor) -> list[str]:
    """Why torch's varlen attention cannot take this qkv."""
    reasons = [] if qkv.device.type == "cuda" else [f"device {qkv.device.type} is not cuda"]
    reasons += [] if qkv.dtype in (torch.float16, torch.bfloat16) else [f"{qkv.dtype} is not 16-bit"]
    dim = qkv.shape[3]
    reasons += [] if dim % 8 == 0 and dim <= 256 else [f"head dim {dim} is no multiple of 8 up to 256"]
    missing = private.varlen_attention_refusal()
    return [*reasons, missing] if missing else reasons


def attention_cpu(qkv: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One call of the flash kernel for each run of neighbours of equal length."""
    tokens, _, heads, dim = qkv.shape
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()  # the kernel takes the last stride for 1
    out, lse = qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=statistics_dtype(qkv))
    bounds, start = cu_seqlens.tolist(), 0
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    for length, run in itertools.groupby(lengths):
        count = sum(1 for _ in run)
        if length == 0:
            continue
        end = start + count * length
        query, key, value = qkv[start:end].view(count, length, 3, heads, dim).permute(2, 0, 3, 1, 4)  # [B, N, L, D]
        part, part_lse = private.cpu_flash_attention(query, key, value, scale)
        out[start:end].view(count, length, heads, dim).copy_(part.transpose(1, 2))
        lse[:, start:end].view(heads, count, length).copy_(part_lse.transpose(0, 1))
        start = end
    return out, lse


def attention_padded(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """All sequences padded to the longest: no host read, any device, any dtype. Scores [B, N, S, S] in memory."""
    tokens = qkv.shape[0]
    lengths = cu_seqlens.diff().long()
    column = torch.arange(max_seqlen, device=qkv.device)
    real = column < lengths[:, None]  # [B, S]
    rows = (cu_seqlens[:-1, None].long() + column).clamp(max=max(tokens - 1, 0))  # [B, S]
    query, key, value = qkv[rows].permute(2, 0, 3, 1, 4)  # [B, N, S, D]
    scores = (query @ key.mT).to(statistics_dtype(qkv)) * scale
    scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    lse = scores.logsumexp(3)  # [B, N, S]
    probabilities = (scores - lse.unsqueeze(3)).exp()
    if keep_bits is not None:
        keep = keep_mask(keep_bits[:, rows], max_seqlen).transpose(0, 1)  # [B, N, S, S]
        probabilities = probabilities * keep * keep_scale(p)
    out = (probabilities.to(qkv.dtype) @ value).transpose(1, 2)  # [B, S, N, D]
    indices = real.flatten().nonzero().flatten()
    return out.flatten(0, 1)[indices], lse.transpose(0, 1).flatten(1)[:, indices]


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    total = residual + (x if bias is None else x + bias)
    if total.device.type == "cpu" and total.dtype in (torch.float16, torch.bfloat16):
        gamma, beta = gamma.float(), beta.float()  # the CPU kernel keeps mean and rstd in gamma's dtype
    elif gamma.dtype != total.dtype:
        gamma, beta = gamma.to(total.dtype), beta.to(total.dtype)
    y, mean, rstd = torch.native_layer_norm(total, gamma.shape, gamma, beta, eps)
    return y.to(residual.dtype), mean.squeeze(1), rstd.squeeze(1)


def packs(device: str, dtype: torch.dtype) -> bool:
    """Whether `pack_weight` copies weights of this dtype on this type of device."""
    return device == "cpu" and private.packed_linear_refusal(dtype) is None


def pack_weight(weight: Tensor) -> Tensor | PackedWeight:
    """weight [N, K] as this backend multiplies fastest with it: a packed copy on a CPU, else itself.

    In fp32 the copy is split into ranges of at most SUMMED_COLUMNS columns.
    """
    if weight.numel() == 0 or not packs(weight.device.type, weight.dtype):
        return weight.detach()
    columns = weight.shape[1]
    count = -(-columns // SUMMED_COLUMNS) if weight.dtype == torch.float32 else 1
    width = -(-columns // count // 16) * 16  # [N, width]
    parts = tuple(private.pack_linear_weight(part) for part in torch.split(weight, width, 1))
    return PackedWeight(parts, weight.detach() if isinstance(weight, torch.nn.Parameter) else None)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, columns: int) -> Tensor:
    """function(x) [T, columns] of x [T, K], in blocks of rows."""
    out = x.new_empty(x.shape[0], columns)
    for rows, block in zip(torch.split(x, BLOCK_ROWS), torch.split(out, BLOCK_ROWS), strict=True):
        block.copy_(function(rows))
    return out


def is_summed(weight: Tensor | PackedWeight) -> bool:
    """Whether products with this weight are sums of several products."""
    return isinstance(weight, PackedWeight) and len(weight.parts) > 1


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedWeight):
        return F.linear(x, weight, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if is_summed(weight) and x.shape[0] > BLOCK_ROWS:
        return by_rows(lambda rows: linear(rows, weight, bias), x, weight.shape[0])
    if weight.plain is not None and x.shape[0] <= SHORT_ROWS and len(weight.parts) >= MANY_PARTS:
        return F.linear(x, weight.plain, bias)
    if weight.dtype == torch.float32 and x.shape[0] <= FEW_ROWS and x.shape[1] < FEW_COLUMNS:
        return linear_of_few_rows(x, weight, bias)
    return sum_of_parts(x, weight, None if bias is None else bias.contiguous())


def sum_of_parts(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [T, K] → x·weightᵀ + bias [T, N], the parts' products added from left to right."""
    pieces = torch.split(x, weight.parts[0].shape[1], 1)
    y = private.packed_linear(pieces[0], weight.parts[0], bias)
    for piece, part in zip(pieces[1:], weight.parts[1:], strict=True):
        y = private.packed_linear_add(piece, part, y)
    return y


def linear_of_few_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [T, K] → x·weightᵀ + bias [T, N], from products over stripes of columns, added up in float64.

    Each stripe stands in a row of its own, zero elsewhere: one product reads the weight once.
    """
    columns = x.shape[1]
    width = 32 if columns < 256 else 64
    stripe = torch.arange(columns) // width
    own = stripe == torch.arange(int(stripe[-1]) + 1)[:, None]  # [stripes, K]
    rows = torch.where(own, x[:, None], 0.0)  # [T, stripes, K]
    y = sum_of_parts(rows.flatten(0, 1), weight, None).view(*rows.shape[:2], -1).double().sum(1)
    return (y if bias is None else y + bias).to(x.dtype)


def linear_gelu(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none"
) -> Tensor:
    parts = weight.parts if isinstance(weight, PackedWeight) else ()
    if len(parts) == 1 and approximate == "none" and x.shape[0] > FEW_ROWS:
        bias = None if bias is None else bias.contiguous()
        return private.packed_linear_gelu(x, parts[0], bias)
    return F.gelu(linear(x, weight, bias), approximate=approximate)  # oneDNN's tanh is off by 5e-3 where GELU is small


def feed_forward(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    if (is_summed(w1) or is_summed(w2)) and x.shape[0] > BLOCK_ROWS:
        return by_rows(lambda rows: feed_forward(rows, w1, b1, w2, b2, approximate), x, w2.shape[0])
    return linear(linear_gelu(x, w1, b1, approximate), w2, b2)
