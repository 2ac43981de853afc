"""Backend "cpu": the kernels that the native library has for CPUs (csrc/cpu/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops import cuda
from fastbert.ops.registry import Backend

OUTSIDE = "index out of range in self"  # as torch.nn.functional.embedding says it


def hidden_reasons(hidden: int) -> list[str]:
    return [] if hidden >= 1 else ["hidden size is 0"]


def embed_layer_norm_reasons(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, *rest: Any
) -> list[str]:
    return hidden_reasons(words.shape[1]) + cuda.embed_dtype_reasons(ids, types, positions, words, *rest)


def embed_layer_norm_backward_reasons(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, *rest: Any,
) -> list[str]:  # fmt: skip
    reasons = embed_layer_norm_reasons(ids, types, positions, words, type_table, position_table, gamma, gamma)
    return reasons + cuda.same_reasons(words=words, grad=grad, pre=pre)


def add_layer_norm_reasons(x: Tensor, *rest: Any) -> list[str]:
    return hidden_reasons(x.shape[1]) + cuda.add_dtype_reasons(x, *rest)


def add_layer_norm_backward_reasons(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, *rest: Any
) -> list[str]:
    return add_layer_norm_reasons(x, bias, residual, gamma, gamma) + cuda.same_reasons(residual=residual, grad=grad)


def attention_reasons(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, *rest: Any) -> list[str]:
    reasons = cuda.dtype_reasons(qkv=qkv) + ([] if qkv.shape[3] >= 1 else ["head_dim is 0"])
    return reasons if scale > 0 else [*reasons, f"scale {scale} is not over 0"]


def attention_backward_reasons(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> list[str]:
    return attention_reasons(qkv, *rest) + cuda.same_reasons(qkv=qkv, grad=grad, out=out)


REASONS: dict[str, Callable[..., list[str]]] = {
    reasons.__name__.removesuffix("_reasons"): reasons
    for reasons in (
        cuda.unpad_reasons, embed_layer_norm_reasons, embed_layer_norm_backward_reasons, add_layer_norm_reasons,
        add_layer_norm_backward_reasons, attention_reasons, attention_backward_reasons,
    )
}  # fmt: skip


def cpu_backends(name: str) -> list[Backend]:
    """The backend "cpu" of an op, if the library has a kernel for it."""
    if name not in REASONS:
        return []

    def refuse(*args: Any) -> list[str]:
        return native.refuse("cpu") or REASONS[name](*args)

    def run(*args: Any) -> Any:
        try:
            return getattr(torch.ops.fastbert_native, name)(*args)
        except RuntimeError as error:
            if OUTSIDE in str(error):
                raise IndexError(OUTSIDE) from None
            raise

    return [Backend("cpu", run, refuse, devices=("cpu",))]
