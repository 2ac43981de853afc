"""Backend "cuda": the CUDA kernels of the native library (csrc/); on a CPU on request, where tests emulate them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops.kernels import plain
from fastbert.ops.registry import Backend

MOST_HIDDEN, MOST_HEADS, MOST_COLUMNS, MOST_HEAD_DIM = 4096, 65535, 2**24, 128
MOST_ROWS = 2**31 - 1
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


def most_reasons(what: str, size: int, most: int) -> list[str]:
    return [] if size <= most else [f"{what} {size} is over {most}"]


def unpad_reasons(mask: Tensor, tokens: int = -1) -> list[str]:
    return [] if mask.dtype in native.MASK_DTYPES else [f"the native unpad takes no mask of {mask.dtype}"]


def pad_reasons(x: Tensor, indices: Tensor, batch: int, length: int) -> list[str]:
    reasons = most_reasons("number of padded rows", batch * length, MOST_ROWS)
    return reasons if x.element_size() <= 8 else [*reasons, f"x has elements of {x.element_size()} bytes, over 8"]


def pad_backward_reasons(grad: Tensor, indices: Tensor) -> list[str]:
    return pad_reasons(grad, indices, 0, 0)


def dropout_bits_reasons(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> list[str]:
    return most_reasons("number of heads", heads, MOST_HEADS)


def embed_dtype_reasons(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, *rest: Any,
) -> list[str]:  # fmt: skip
    """In words, what embed_layer_norm's kernels do not take of the dtypes, those for CPUs too."""
    others = {"type_table": type_table, "position_table": position_table, "gamma": gamma, "beta": beta}
    return dtype_reasons(words=words) + same_reasons(words=words, **others)


def embed_layer_norm_reasons(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, *rest: Any
) -> list[str]:
    reasons = most_reasons("hidden size", words.shape[1], MOST_HIDDEN)
    return reasons + embed_dtype_reasons(ids, types, positions, words, *rest)


def embed_layer_norm_backward_reasons(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, *rest: Any,
) -> list[str]:  # fmt: skip
    reasons = embed_layer_norm_reasons(ids, types, positions, words, type_table, position_table, gamma, gamma)
    return reasons + same_reasons(words=words, grad=grad, pre=pre)


def add_dtype_reasons(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, *rest: Any
) -> list[str]:
    """In words, what add_layer_norm's kernels do not take of the dtypes, those for CPUs too."""
    reasons = dtype_reasons(x=x, residual=residual)
    reasons += same_reasons(x=x, bias=bias) + same_reasons(residual=residual, gamma=gamma, beta=beta)
    if residual.dtype not in (x.dtype, torch.float32):
        reasons.append(f"x is {x.dtype} beside a residual of {residual.dtype}: it takes one dtype, or float32 there")
    return reasons


def add_layer_norm_reasons(x: Tensor, *rest: Any) -> list[str]:
    return most_reasons("hidden size", x.shape[1], MOST_HIDDEN) + add_dtype_reasons(x, *rest)


def add_layer_norm_backward_reasons(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, *rest: Any
) -> list[str]:
    return add_layer_norm_reasons(x, bias, residual, gamma, gamma) + same_reasons(residual=residual, grad=grad)


def bias_gelu_reasons(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> list[str]:
    return (
        most_reasons("number of columns", x.shape[1], MOST_COLUMNS) + dtype_reasons(x=x) + same_reasons(x=x, bias=bias)
    )


def bias_gelu_backward_reasons(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> list[str]:
    return bias_gelu_reasons(x, bias) + same_reasons(x=x, grad=grad)


def linear_gelu_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> list[str]:
    reasons = most_reasons("number of columns", weight.shape[0], MOST_COLUMNS) + dtype_reasons(x=x)
    return reasons + same_reasons(x=x, weight=weight, bias=bias)


def linear_gelu_backward_reasons(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> list[str]:
    return linear_gelu_reasons(x, weight, bias) + same_reasons(x=x, grad=grad, pre=pre)


def feed_forward_reasons(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> list[str]:  # fmt: skip
    reasons = most_reasons("intermediate size", w1.shape[0], MOST_COLUMNS) + dtype_reasons(x=x)
    return reasons + same_reasons(x=x, w1=w1, b1=b1, w2=w2, b2=b2)


def feed_forward_backward_reasons(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> list[str]:  # fmt: skip
    return feed_forward_reasons(x, w1, b1, w2, None) + same_reasons(x=x, grad=grad, pre=pre)


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
        unpad_reasons, pad_reasons, pad_backward_reasons, dropout_bits_reasons, embed_layer_norm_reasons,
        embed_layer_norm_backward_reasons, add_layer_norm_reasons, add_layer_norm_backward_reasons, bias_gelu_reasons,
        bias_gelu_backward_reasons, linear_gelu_reasons, linear_gelu_backward_reasons, feed_forward_reasons,
        feed_forward_backward_reasons, attention_reasons, attention_backward_reasons,
    )
}  # fmt: skip


def cuda_backends(name: str) -> list[Backend]:
    """The backend "cuda" of an op, if the library has a kernel for it."""
    if name not in REASONS:
        return []

    def refuse(*args: Any) -> list[str]:
        return native.refuse_cuda(args[0].device.type) or REASONS[name](*plain(args))

    def run(*args: Any) -> Any:
        is_tanh = (arg == "tanh" if isinstance(arg, str) else arg for arg in plain(args))
        return native.cuda_op(name, args[0].device.type)(*is_tanh)

    return [Backend("cuda", run, refuse, devices=("cuda",), on_request=("cpu",))]
