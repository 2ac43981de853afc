"""Backend "cuda": the CUDA kernels of the native library (csrc/); on a CPU on request, where tests emulate them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops.registry import Backend

MOST_HIDDEN, MOST_HEAD_DIM = 4096, 128
TENSOR_CORES = (8, 0)  # the compute capability from which on attention has kernels
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def dtype_reasons(**tensors: Tensor | None) -> list[str]:
    """In words, which of the named tensors have a dtype that the kernels do not take."""
    return [
        f"{name} is {tensor.dtype}: it takes float32, float16 and bfloat16"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in FLOATS
    ]


def same_reasons(**tensors: Tensor | None) -> list[str]:
    """In words, which of the named tensors differ in dtype from the first."""
    (first, like), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    return [f"{name} is {x.dtype} and {first} {like.dtype}" for name, x in others if x.dtype != like.dtype]


def hidden_reasons(hidden: int) -> list[str]:
    return [] if 1 <= hidden <= MOST_HIDDEN else [f"hidden size {hidden} is none of 1 to {MOST_HIDDEN}"]


def add_layer_norm_reasons(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, *rest: Any
) -> list[str]:
    reasons = hidden_reasons(x.shape[1]) + dtype_reasons(x=x, residual=residual)
    reasons += same_reasons(x=x, bias=bias) + same_reasons(residual=residual, gamma=gamma, beta=beta)
    if residual.dtype not in (x.dtype, torch.float32):
        reasons.append(
            f"x is {x.dtype} beside a residual of {residual.dtype}: it takes one dtype, or a float32 residual"
        )
    return reasons


def add_layer_norm_backward_reasons(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, *rest: Any
) -> list[str]:
    return add_layer_norm_reasons(x, bias, residual, gamma, gamma) + same_reasons(residual=residual, grad=grad)


def card_reasons(device: torch.device) -> list[str]:
    """In words, why a device cannot run kernels with mma.sync of bfloat16 and cp.async; a CPU emulates them."""
    if device.type != "cuda":
        return []
    major, minor = torch.cuda.get_device_capability(device)
    return [] if (major, minor) >= TENSOR_CORES else [f"it needs sm_80, this is sm_{major}{minor}"]


def attention_reasons(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, *rest: Any) -> list[str]:
    reasons = card_reasons(qkv.device) + dtype_reasons(qkv=qkv)
    if not 1 <= qkv.shape[3] <= MOST_HEAD_DIM:
        reasons.append(f"head_dim {qkv.shape[3]} is none of 1 to {MOST_HEAD_DIM}")
    return reasons if scale > 0 else [*reasons, f"scale {scale} is not over 0"]


def attention_backward_reasons(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> list[str]:
    return attention_reasons(qkv, *rest) + same_reasons(qkv=qkv, grad=grad, out=out)


REASONS: dict[str, Callable[..., list[str]]] = {
    reasons.__name__.removesuffix("_reasons"): reasons
    for reasons in (
        add_layer_norm_reasons, add_layer_norm_backward_reasons, attention_reasons, attention_backward_reasons,
    )
}  # fmt: skip


def cuda_backends(name: str) -> list[Backend]:
    """The backend "cuda" of an op, if the library has a kernel for it."""
    if name not in REASONS:
        return []

    def refuse(*args: Any) -> list[str]:
        return native.refuse_cuda(args[0].device.type) or REASONS[name](*args)

    def run(*args: Any) -> Any:
        return native.cuda_op(name, args[0].device.type)(*args)

    return [Backend("cuda", run, refuse, devices=("cuda",), on_request=("cpu",))]
