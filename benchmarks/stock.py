"""Each op as HuggingFace or torch.nn writes it, on plain weights: the base of timings and of parity, the tests' too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops, parity

if TYPE_CHECKING:
    from benchmarks.cases import OpCall


def unpad(mask: Tensor) -> tuple[Tensor, Tensor]:
    lengths = mask.sum(1, dtype=torch.int32)
    return mask.flatten().nonzero().flatten(), F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch * length, x.shape[1])
    out[indices] = x
    return out.view(batch, length, x.shape[1])


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """BertEmbeddings: words, then token types, then positions."""
    embeddings = F.embedding(ids, words)
    if types is not None and type_table is not None:
        embeddings = embeddings + F.embedding(types, type_table)
    embeddings = embeddings + F.embedding(positions, position_table)
    return F.layer_norm(embeddings, gamma.shape, gamma, beta, eps)


def padded(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [3, B, N, S, D]; HuggingFace's mask [B, 1, S, S], True where a key is real; real [B, S]."""
    lengths = cu_seqlens.diff().long()
    real = torch.arange(max_seqlen, device=qkv.device) < lengths[:, None]
    rows = qkv.new_zeros(*real.shape, *qkv.shape[1:])
    rows[real] = qkv
    return rows.permute(2, 0, 3, 1, 4), real[:, None, None].expand(-1, 1, max_seqlen, -1), real


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """SDPA on the padded batch with HuggingFace's mask; real rows [T, N, D] are returned."""
    (query, key, value), mask, real = padded(qkv, cu_seqlens, max_seqlen)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)[real]


def attention_and_lse(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    """attention, and lse [N, T] from scores in the tested dtype."""
    (query, key, _), mask, real = padded(qkv, cu_seqlens, max_seqlen)
    scores = (query @ key.transpose(2, 3) * scale).to(torch.promote_types(qkv.dtype, torch.float32))
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(3).transpose(1, 2)[real].T
    return attention(qkv, cu_seqlens, max_seqlen, scale), lse


def add_layer_norm(x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """BertSelfOutput: dense's bias, then LayerNorm(hidden_states + input_tensor)."""
    return F.layer_norm((x if bias is None else x + bias) + residual, gamma.shape, gamma, beta, eps)


def add_layer_norm_and_statistics(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """add_layer_norm, and mean and rstd [T] of the sum in the tested dtype."""
    total = (x if bias is None else x + bias) + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    y = add_layer_norm(x, bias, residual, gamma, beta, eps)
    return y, wide.mean(1), (wide.var(1, correction=0) + eps) ** -0.5


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """BertIntermediate: dense, then GELU, each rounded to the dtype."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none"
) -> Tensor:
    """BertIntermediate, then BertOutput's dense."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


# What stock models compute, for timings; with every output of the op, for parity.
ALL: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (unpad, pad, embed_layer_norm, attention, add_layer_norm, linear, linear_gelu, feed_forward)
}
EVERY_OUTPUT = ALL | {"attention": attention_and_lse, "add_layer_norm": add_layer_norm_and_statistics}
ELEMENTWISE = ("embed_layer_norm", "add_layer_norm")  # judged per binade


def plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with packed weights unpacked."""
    return tuple(a.to_dense() if isinstance(a, ops.PackedWeight) else a for a in arguments)


def double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with floating tensors in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in plain(arguments))


@torch.inference_mode()
def verdict(call: OpCall, backend: str) -> tuple[bool, str]:
    """Whether every output of a backend's call keeps the parity rule (integers: is equal), and the worst in words."""
    op = getattr(ops, call.op)
    with ops.use_backend("reference"):
        expected = outputs(op(*double(call.arguments)))
    base = outputs(EVERY_OUTPUT[call.op](*plain(call.arguments)))
    with ops.use_backend(backend):
        got = outputs(op(*call.arguments))
    found = []
    for i, (ours, ref, theirs) in enumerate(zip(got, expected, base, strict=True)):
        if not ref.is_floating_point():
            equal = torch.equal(ours, ref)
            found.append((0.0 if equal else float("inf"), f"output {i} {'is equal' if equal else 'differs'}"))
            continue
        judged = parity.judge(ours, ref, theirs, elementwise=call.op in ELEMENTWISE and i == 0)
        found.append((judged.ratio, f"output {i}: {judged}"))
    ratio, words = max(found)
    return ratio <= 1, words


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
