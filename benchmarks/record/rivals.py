"""What an op's timing stands beside: PyTorch's own ways to the same, and the op with a stage left out or added.

A rival may do less than the op (no mask, no bias, no statistics): its name says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import stock
from benchmarks.cases import OpCall
from fastbert import ops
from fastbert.ops import LENGTH_CLASSES

P, SEED = 0.1, 7
# Of a backward's FLOPs: those for dx alone, and those for all but dx.
DX_SHARES = {"linear_backward": (0.5, 0.5), "linear_gelu_backward": (0.5, 0.5), "feed_forward_backward": (0.5, 0.75)}
Make = Callable[[], Callable[[], object]]


def rivals(call: OpCall) -> Iterator[tuple[str, Make]]:
    """(name, what makes the call of PyTorch's own); making it may raise where PyTorch has no such kernel."""
    forward = call.forward or call
    grad = call.arguments[0] if call.forward else None
    arguments = stock.plain(forward.arguments)
    if forward.op == "attention":
        qkv, cu_seqlens, longest, scale = arguments[:4]
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            yield f"SDPA {name}, padded, no mask", lambda b=backend: sdpa(b, qkv, cu_seqlens, longest, scale, grad)  # type: ignore[misc]
        yield "varlen_attn, packed", lambda: varlen(qkv, cu_seqlens, longest, scale, grad)
    elif call.op == "linear_gelu":
        yield "F.linear, no GELU", lambda: lambda: F.linear(*arguments[:3])
    elif call.op == "feed_forward":
        x, w1, b1, w2, b2 = arguments[:5]
        yield "both F.linear, no GELU", lambda: lambda: F.linear(F.linear(x, w1, b1), w2, b2)
    elif call.op == "add_layer_norm":
        _, _, residual, gamma, beta, eps = arguments[:6]
        yield (
            "F.layer_norm, no bias, no residual",
            lambda: lambda: F.layer_norm(residual, gamma.shape, gamma, beta, eps),
        )


def sdpa(
    backend: SDPBackend, qkv: Tensor, cu_seqlens: Tensor, longest: int, scale: float, grad: Tensor | None
) -> Callable[[], object]:
    """SDPA on a batch that is padded already: every key counts, those of padding too."""
    padded, _, real = stock.padded(qkv, cu_seqlens, longest)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, scale=scale)

    wide = None
    if grad is not None:
        wide = grad.new_zeros(*real.shape, *grad.shape[1:])
        wide[real] = grad
        wide = wide.transpose(1, 2)
    return checked(forward, [x.contiguous() for x in padded], wide)


def varlen(qkv: Tensor, cu_seqlens: Tensor, longest: int, scale: float, grad: Tensor | None) -> Callable[[], object]:
    """FlashAttention for packed sequences, whose scale is the head dim's by default."""
    from torch.nn.attention.varlen import varlen_attn

    if abs(scale * qkv.shape[3] ** 0.5 - 1) > 1e-6:
        raise ValueError(f"varlen_attn scales by {qkv.shape[3]}^-0.5, not by {scale}")

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest)
        return out

    return checked(forward, [x.contiguous() for x in qkv.unbind(1)], grad)


def checked(forward: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None) -> Callable[[], object]:
    """The forward, or its backward alone; run once, so that what PyTorch refuses is refused here."""
    if grad is None:
        forward(*inputs)
        return lambda: forward(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = forward(*leaves)
    torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def variants(call: OpCall) -> Iterator[tuple[str, OpCall]]:
    """(what is changed, the call): stages left out or added."""
    forward = call.forward or call
    seed = torch.tensor(SEED, device=call.arguments[0].device)
    if forward.op == "attention":
        yield from attention_variants(call, forward, seed)
    elif forward.op == "add_layer_norm":
        yield "dropout", changed(call, p=P, seed=seed, site=1)
        if call is forward:
            yield "no bias", changed(call, bias=None)
    elif forward.op == "embed_layer_norm":
        yield "dropout", changed(call, p=P, seed=seed)
        if call is forward:
            yield "saved", changed(call, save=True)
    elif call.op in ("linear_gelu", "feed_forward"):
        yield "saved", changed(call, save=True)
        yield "tanh", changed(call, approximate="tanh")
    if call.op == "linear_gelu":
        flops, moved = call.flops, call.bytes_moved
        yield "no GELU: linear", OpCall("linear", call.arguments[:3], flops, moved)
    if call.op in DX_SHARES:
        needed, (alone, without) = call.arguments[-1], DX_SHARES[call.op]
        yield "dx alone", changed(call, share=alone, needed=[True] + [False] * (len(needed) - 1))
        yield "no dx", changed(call, share=without, needed=[False, *needed[1:]])


def attention_variants(call: OpCall, forward: OpCall, seed: Tensor) -> Iterator[tuple[str, OpCall]]:
    """With the order and the length classes that `unpad` gives to models on a GPU, and with keep bits."""
    qkv, cu_seqlens, longest = forward.arguments[:3]
    lengths = cu_seqlens.diff()
    order = torch.argsort(lengths, descending=True, stable=True).to(torch.int32)
    within = [int((lengths <= bound).sum()) for bound in LENGTH_CLASSES]
    classes = [end - start for start, end in pairwise((0, *within, len(lengths)))]
    with ops.use_backend("torch"):
        bits = ops.dropout_bits(seed, 0, cu_seqlens, qkv.shape[0], longest, qkv.shape[2], P)
    yield "order, classes", changed(call, order=order, classes=classes)
    yield "keep bits", changed(call, extra=bits.nbytes, keep_bits=bits, p=P)
    yield (
        "order, classes, keep bits",
        changed(call, extra=bits.nbytes, keep_bits=bits, p=P, order=order, classes=classes),
    )


def changed(call: OpCall, extra: int = 0, share: float = 1.0, **arguments: Any) -> OpCall:
    """The call with other arguments, so many bytes more to move, this share of its FLOPs."""
    names, given = stock.OPS[call.op].arguments(), list(call.arguments)
    given += [None] * (len(names) - len(given))
    defaults = default_arguments(call.op)
    for i, name in enumerate(names):
        given[i] = arguments.get(name, given[i] if i < len(call.arguments) else defaults[name])
    return replace(call, arguments=tuple(given), flops=int(share * call.flops), bytes_moved=call.bytes_moved + extra)


def default_arguments(op: str) -> dict[str, Any]:
    """The defaults of an op's arguments."""
    parameters = inspect.signature(stock.OPS[op].backends["reference"].run).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
