"""Each op as HuggingFace or torch.nn writes it, on plain weights: the base of timings and of parity, the tests' too.

The backward of an op is autograd's of its formula.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops, parity
from fastbert.ops import encoder
from fastbert.ops.sample_calls import outputs

if TYPE_CHECKING:
    from benchmarks.cases import OpCall

OPS = {op.name: op for op in ops.ALL}
Dropout = tuple[Tensor, float] | None  # which elements are kept, and what those are multiplied with


def unpad(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lengths = mask.sum(1, dtype=torch.int32)
    order = lengths.sort(descending=True, stable=True).indices.to(torch.int32)
    return mask.flatten().nonzero().flatten(), F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), order


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch * length, x.shape[1])
    out[indices] = x
    return out.view(batch, length, x.shape[1])


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """nn.Dropout with its choice handed to it."""
    return x if dropout is None else x * dropout[0] * dropout[1]


def embeddings(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, word_padding: int = -1, position_padding: int = -1,
) -> Tensor:  # fmt: skip
    """BertEmbeddings before its LayerNorm: words, then token types, then positions."""
    total = F.embedding(ids, words, None if word_padding < 0 else word_padding)
    if types is not None and type_table is not None:
        total = total + F.embedding(types, type_table)
    return total + F.embedding(positions, position_table, None if position_padding < 0 else position_padding)


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, dropout: Dropout = None, word_padding: int = -1,
    position_padding: int = -1, save: bool = False,
) -> Tensor:  # fmt: skip
    """BertEmbeddings."""
    total = embeddings(ids, types, positions, words, type_table, position_table, word_padding, position_padding)
    return dropped(F.layer_norm(total, gamma.shape, gamma, beta, eps), dropout)


def embed_layer_norm_and_statistics(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, dropout: Dropout = None, word_padding: int = -1,
    position_padding: int = -1, save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """embed_layer_norm, mean and rstd [T] of the sum in the tested dtype, and the sum if it is to be saved."""
    total = embeddings(ids, types, positions, words, type_table, position_table)
    rows = ids, types, positions, words, type_table, position_table
    y = embed_layer_norm(*rows, gamma, beta, eps, dropout, word_padding, position_padding)
    return y, *statistics(total, eps), total if save else words.new_empty(0)


def statistics(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd [T] of rows in the tested dtype, computed in fp32 or wider."""
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    return wide.mean(1), (wide.var(1, correction=0) + eps) ** -0.5


def dropout_bits(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> Tensor:
    """What nn.Dropout draws for the padded attention probabilities [B, N, S, S], for timings: other numbers."""
    return torch.empty(cu_seqlens.shape[0] - 1, heads, max_seqlen, max_seqlen, device=seed.device).bernoulli_(1 - p)


def padded(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [3, B, N, S, D]; HuggingFace's mask [B, 1, S, S], True where a key is real; real [B, S]."""
    lengths = cu_seqlens.diff().long()
    real = torch.arange(max_seqlen, device=qkv.device) < lengths[:, None]
    rows = qkv.new_zeros(*real.shape, *qkv.shape[1:])
    rows[real] = qkv
    return rows.permute(2, 0, 3, 1, 4), real[:, None, None].expand(-1, 1, max_seqlen, -1), real


def kept(keep_bits: Tensor, length: int) -> Tensor:
    """keep_bits [N, T, W] int32, bit k of word w is key 32·w + k → bool [N, T, length]."""
    place = torch.arange(length, device=keep_bits.device)
    return (keep_bits[:, :, place // 32] >> place % 32) & 1 == 1


def keep_scale(p: float) -> float:
    """What is kept is multiplied with this, where p is told by 16 bits: 1/(1 - p)."""
    share = math.floor(p * 65536 + 0.5) / 65536
    return 1 / (1 - share) if share < 1 else 0.0


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SDPA on the padded batch with HuggingFace's mask, dropout by given bits; real rows [T, N, D] are returned.

    bias [3, N, D]: what qkv holds already; it gets the gradient that the bias of qkv's product gets.
    """
    qkv = qkv if bias is None else qkv + (bias - bias.detach())
    (query, key, value), mask, real = padded(qkv, cu_seqlens, max_seqlen)
    if keep_bits is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)[real]
    keep = mask.new_zeros(*real.shape, qkv.shape[2], max_seqlen)
    keep[real] = kept(keep_bits, max_seqlen).transpose(0, 1)
    wide = torch.promote_types(qkv.dtype, torch.float32)  # as SDPA computes where there is dropout
    query, key, value = (x.to(wide) for x in (query, key, value))
    probabilities = (query @ key.mT * scale).masked_fill(~mask, -torch.inf).softmax(3)
    out = dropped(probabilities, (keep.transpose(1, 2), keep_scale(p))) @ value
    return out.to(qkv.dtype).transpose(1, 2)[real]


def attention_and_lse(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention, and lse [N, T] from scores in the tested dtype."""
    (query, key, _), mask, real = padded(qkv, cu_seqlens, max_seqlen)
    scores = (query @ key.transpose(2, 3) * scale).to(torch.promote_types(qkv.dtype, torch.float32))
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(3).transpose(1, 2)[real].T
    return attention(qkv, cu_seqlens, max_seqlen, scale, keep_bits, p, order, classes, bias), lse


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, dropout: Dropout = None
) -> Tensor:
    """BertSelfOutput: dense's bias, dropout, then LayerNorm(hidden_states + input_tensor)."""
    total = dropped(x if bias is None else x + bias, dropout) + residual
    return F.layer_norm(total, gamma.shape, gamma, beta, eps)


def add_layer_norm_and_statistics(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, dropout: Dropout = None
) -> tuple[Tensor, Tensor, Tensor]:
    """add_layer_norm, and mean and rstd [T] of the sum in the tested dtype."""
    total = dropped(x if bias is None else x + bias, dropout) + residual
    return add_layer_norm(x, bias, residual, gamma, beta, eps, dropout), *statistics(total, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none", save: bool = False
) -> Tensor:
    """BertIntermediate: dense, then GELU, each rounded to the dtype."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_gelu_and_pre(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none", save: bool = False
) -> tuple[Tensor, Tensor]:
    """linear_gelu, and what GELU was taken of, if it is to be saved."""
    return linear_gelu(x, weight, bias, approximate), F.linear(x, weight, bias) if save else x.new_empty(0)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> Tensor:  # fmt: skip
    """BertIntermediate, then BertOutput's dense."""
    return F.linear(linear_gelu(x, w1, b1, approximate), w2, b2)


def feed_forward_and_pre(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """feed_forward, and what GELU was taken of, if it is to be saved."""
    return feed_forward(x, w1, b1, w2, b2, approximate), F.linear(x, w1, b1) if save else x.new_empty(0)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """BertIntermediate behind a product without bias."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def encoder_forward(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    """BertEncoder: BertLayer after BertLayer."""
    for start in range(0, len(tensors), ops.LAYER_TENSORS):
        layer = tensors[start : start + ops.LAYER_TENSORS]
        qkv, out, first, second = ((layer[place], layer[place + encoder.BIAS]) for place in encoder.WEIGHTS)
        gamma1, beta1, gamma2, beta2 = (layer[place] for place in encoder.NORMS)
        rows = F.linear(x, *qkv).view(len(x), 3, heads, -1)
        context = attention(rows, cu_seqlens, max_seqlen, scale).flatten(1)
        h = add_layer_norm(F.linear(context, *out), None, x, gamma1, beta1, eps)
        x = add_layer_norm(feed_forward(h, *first, *second, approximate), None, h, gamma2, beta2, eps)
    return x


def quantized_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
    outliers: Tensor | None = None, rotated: int = 1, activation: str = "",
) -> Tensor:  # fmt: skip
    """A product in the tested dtype of what a quantized x and weight stand for."""
    rows = x.float().clone()
    full = weight.to(x.dtype) * scales.to(x.dtype)[:, None]
    if columns is not None and outliers is not None:
        rows[:, columns] = 0
    hadamard = torch.ones(1, 1, device=x.device)
    while len(hadamard) < rotated:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=x.device), hadamard)
    rows = (rows.double().unflatten(1, (-1, rotated)) @ hadamard.double()).flatten(1).float()  # type: ignore[no-untyped-call]
    step = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-126)
    found = torch.round(rows * (1 / step)).to(x.dtype) * step.to(x.dtype)
    if columns is not None and outliers is not None:
        large = x[:, columns].to(torch.bfloat16).to(x.dtype)
        found, full = torch.cat([found, large], 1), torch.cat([full, outliers.to(x.dtype)], 1)
    y = F.linear(found, full, None if bias is None else bias.to(x.dtype))
    return F.gelu(y, approximate=activation) if activation else y


# What stock models compute, for timings; with every output of the op, for parity.
ALL: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        unpad, pad, embed_layer_norm, dropout_bits, attention, add_layer_norm, linear, linear_gelu, feed_forward,
        bias_gelu, encoder_forward, quantized_linear,
    )
}  # fmt: skip
EVERY_OUTPUT = ALL | {
    "attention": attention_and_lse,
    "embed_layer_norm": embed_layer_norm_and_statistics,
    "add_layer_norm": add_layer_norm_and_statistics,
    "linear_gelu": linear_gelu_and_pre,
    "feed_forward": feed_forward_and_pre,
}
# The outputs that are judged per binade. Sums over rows (of weights, of biases, of tables) are not.
ELEMENTWISE = {
    "embed_layer_norm": ("y",), "add_layer_norm": ("y",), "add_layer_norm_backward": ("x_grad", "residual_grad"),
    "pad_backward": ("x",), "bias_gelu": ("y",), "bias_gelu_backward": ("x_grad",),
}  # fmt: skip


def plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with packed weights unpacked, those of layers too."""
    return tuple(
        a.to_dense()
        if isinstance(a, ops.PackedWeight)
        else plain_layers(a, arguments[0].shape[1])
        if isinstance(a, list) and isinstance(a[0], Tensor)
        else a
        for a in arguments
    )


def plain_layers(tensors: list[Tensor], hidden: int) -> list[Tensor]:
    """The tensors of layers of encoder_forward with the weights taken out of their panels."""
    found, out, second = list(tensors), encoder.WEIGHTS[1], encoder.WEIGHTS[3]
    for start in range(0, len(found), ops.LAYER_TENSORS):
        biases = {place: found[start + place + encoder.BIAS] for place in encoder.WEIGHTS}
        for place, bias in biases.items():
            width = {out: biases[0].shape[0] // 3, second: biases[encoder.WEIGHTS[2]].shape[0]}.get(place, hidden)
            found[start + place] = encoder.plain(found[start + place], bias, width)
    return found


def double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with floating tensors in float64."""

    def wide(a: Any) -> Any:
        if isinstance(a, list):
            return [wide(one) for one in a]
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(wide(a) for a in plain(arguments))


def differentiated(op: ops.Op, arguments: Sequence[Any]) -> tuple[int, ...]:
    """The places of those arguments whose gradients the op gives, in its order; None and left out: no gradient."""
    assert op.gradient is not None
    places = (op.arguments().index(name) for name in op.gradient.of)
    return tuple(i for i in places if i < len(arguments) and arguments[i] is not None)


def graph(function: Callable[..., Any], arguments: Sequence[Any], places: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The first output with its graph, and the leaves at these places of the arguments."""
    leaves = {i: arguments[i].detach().requires_grad_() for i in places}
    with torch.enable_grad():
        found = function(*(leaves.get(i, argument) for i, argument in enumerate(arguments)))
    return outputs(found)[0], list(leaves.values())


def gradients(
    function: Callable[..., Any], arguments: Sequence[Any], places: Sequence[int], grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the arguments at these places, by autograd, where the first output's is `grad`."""
    first, leaves = graph(function, arguments, places)
    return torch.autograd.grad(first, leaves, grad)


def prepared(call: OpCall) -> Callable[[], Any]:
    """What is timed as stock: the formula, or autograd through it without its forward."""
    if call.forward is None:
        return functools.partial(ALL[call.op], *plain(call.arguments))
    arguments = plain(call.forward.arguments)
    places = differentiated(OPS[call.forward.op], arguments)
    first, leaves = graph(ALL[call.forward.op], arguments, places)
    return lambda: torch.autograd.grad(first, leaves, call.arguments[0], retain_graph=True)


def ref_and_base(call: OpCall) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a call gives in float64 by the reference, and in its dtype by the stock formula; gradients by autograd."""
    op, arguments = OPS[call.op], plain(call.arguments)
    if call.forward is None:
        with ops.use_backend("reference"):
            return outputs(op(*double(arguments))), outputs(EVERY_OUTPUT[call.op](*arguments))
    op, arguments, grad = OPS[call.forward.op], plain(call.forward.arguments), call.arguments[0]
    places = differentiated(op, arguments)
    with ops.use_backend("reference"):
        ref = gradients(op, double(arguments), places, grad.double())
    return ref, gradients(ALL[op.name], arguments, places, grad)


@torch.no_grad()
def verdict(call: OpCall, backend: str) -> tuple[bool, str]:
    """Whether every output of a backend's call keeps the parity rule (integers: is equal), and the worst in words.

    A backward is judged against gradients of the forward in float64: what it was handed (statistics, the output of
    the forward) is rounded, and these roundings are its own.
    """
    op = OPS[call.op]
    expected, base = ref_and_base(call)
    with ops.use_backend(backend):
        given = op.packed(op.backends[backend], call.arguments)
        got = dict(zip(op.returns(), outputs(op(*given)), strict=True))
    wanted = call.arguments[-1] if op.arguments()[-1] == "needed" else [True] * len(got)
    names = [name for name, want in zip(got, wanted, strict=True) if want]
    found = []
    for name, ref, theirs in zip(names, expected, base, strict=True):
        if not ref.is_floating_point():
            equal = torch.equal(got[name], ref)
            found.append((0.0 if equal else float("inf"), f"{name} {'is equal' if equal else 'differs'}"))
            continue
        judged = parity.judge(got[name], ref, theirs, elementwise=name in ELEMENTWISE.get(op.name, ()))
        found.append((judged.ratio, f"{name}: {judged}"))
    ratio, words = max(found)
    return ratio <= 1, words
