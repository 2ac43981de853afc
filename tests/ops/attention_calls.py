"""Calls of attention with what they are judged by: for the kernels' own tests, Triton's and CUDA's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import stock
from fastbert.ops import LENGTH_CLASSES, reference
from tests.ops import philox
from tests.ops.cases import SEED, normal

Results = dict[str, Tensor]  # out, lse, dqkv, dbias


@functools.cache
def call(
    lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype, kind: str = ""
) -> tuple[tuple, Tensor, Results, Results]:
    """(arguments, upstream gradient, ref, base) of a call in the dtype; kind: "", "peaked", "dropout"."""
    like = f"{lengths} {heads} {dim}"
    qkv = normal(sum(lengths), 3, heads, dim, like=like)
    if kind == "peaked":
        qkv[:, 0] *= 8  # scores of size 8
    qkv, grad = qkv.to(dtype), normal(sum(lengths), heads, dim, like=f"gradient {like}").to(dtype)
    cu_seqlens, p = torch.tensor([0, *lengths]).cumsum(0).int(), 0.1 if kind == "dropout" else 0.0
    bits = philox.bits(SEED, 0, cu_seqlens, max(lengths), heads, p) if p else None
    arguments = qkv, cu_seqlens, max(lengths), dim**-0.5, bits, p
    out, lse = reference.attention(qkv.double(), *arguments[1:])
    both = [True, True]
    found = reference.attention_backward(grad.double(), qkv.double(), out, lse, *arguments[1:], None, (), both)
    with_bias = *arguments, None, (), torch.zeros_like(qkv[0])
    base = *stock.attention_and_lse(*arguments), *stock.gradients(stock.attention, with_bias, (0, 8), grad)
    names = "out", "lse", "dqkv", "dbias"
    return arguments, grad, dict(zip(names, (out, lse, *found), strict=True)), dict(zip(names, base, strict=True))


def classes_of(lengths: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """The order, longest first, and how many sequences each length class holds, as `unpad` makes them."""
    found = [sum(length > bound for bound in LENGTH_CLASSES) for length in lengths]
    order = torch.argsort(torch.tensor(lengths), descending=True, stable=True).int()
    return order, [found.count(n) for n in range(len(LENGTH_CLASSES) + 1)]
