"""Backend "cpu": the kernels that the native library has for CPUs (csrc/cpu/)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import native
from fastbert.ops import cuda
from fastbert.ops.encoder import BIAS, NORMS, ROTATED, TENSORS, WEIGHTS
from fastbert.ops.packed import PackedWeight, PanelWeight, panels_of
from fastbert.ops.registry import Backend

TAKES = "it takes float32, float16, bfloat16 and int8"
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


def pack_reasons(dtype: torch.dtype) -> list[str]:
    """In words, why weights of a dtype are not packed for the library's products."""
    takes = dtype in (*cuda.FLOATS, torch.int8)
    reasons = native.refuse("cpu") + ([] if takes else [f"weights are {dtype}: {TAKES}"])
    if reasons:
        return reasons
    if native.isa() == "baseline":
        return ["without AVX2 its products are slower than oneDNN's"]
    if dtype == torch.bfloat16 and native.has_amx():
        return ["this CPU has AMX, which oneDNN's products of bfloat16 use and the library's do not"]
    return []


def pack_weight(weight: Tensor) -> Tensor | PackedWeight:
    """weight [N, K] in panels; float16, of which CPUs have no products, in float32. An empty one stays as it is.

    And one of a dtype that the products do not take, which say so.
    """
    if weight.numel() == 0 or weight.dtype not in (*cuda.FLOATS, torch.int8):
        return weight.detach()
    wide = weight.detach().to(torch.float32 if weight.dtype == torch.float16 else weight.dtype)
    kept = weight.detach() if isinstance(weight, torch.nn.Parameter) else None
    sums = wide.sum(1, dtype=torch.int32) if wide.dtype == torch.int8 else None
    return PanelWeight(panels_of(wide), weight.shape, weight.dtype, kept, sums)


def weight_reasons(**weights: Tensor | PackedWeight) -> list[str]:
    return [
        f"{name} is not packed for it (ops.pack_weight)"
        for name, w in weights.items()
        if not isinstance(w, PanelWeight)
    ]


def linear_reasons(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> list[str]:
    return cuda.dtype_reasons(x=x) + cuda.same_reasons(x=x, bias=bias) + weight_reasons(weight=weight)


def linear_gelu_reasons(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> list[str]:
    return linear_reasons(x, weight, bias)


def feed_forward_reasons(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none", save: bool = False,
) -> list[str]:  # fmt: skip
    return cuda.dtype_reasons(x=x) + cuda.same_reasons(x=x, b1=b1, b2=b2) + weight_reasons(w1=w1, w2=w2)


def linear(x: Tensor, weight: PanelWeight, bias: Tensor | None = None) -> Tensor:
    return product(x, weight, bias, 0)


def linear_gelu(
    x: Tensor, weight: PanelWeight, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> tuple[Tensor, Tensor]:
    if save:
        pre = product(x, weight, bias, 0)
        return F.gelu(pre, approximate=approximate), pre
    return product(x, weight, bias, ACTIVATIONS[approximate]), x.new_empty(0)


def product(x: Tensor, weight: PanelWeight, bias: Tensor | None, activation: int) -> Tensor:
    """x [T, K] → x·weightᵀ + bias [T, N]; activation: csrc/linear.h's, 1 is erf GELU, 2 tanh's."""
    native_op = torch.ops.fastbert_native.packed_linear
    return native_op(x, [weight.panels], weight.shape[0], bias, activation, 1)  # type: ignore[no-any-return]


def feed_forward(
    x: Tensor, w1: PanelWeight, b1: Tensor | None, w2: PanelWeight, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if save:
        inner, pre = linear_gelu(x, w1, b1, approximate, save)
        return product(inner, w2, b2, 0), pre
    y = torch.ops.fastbert_native.packed_feed_forward(
        x, [w1.panels], w1.shape[0], b1, [w2.panels], w2.shape[0], b2, approximate == "tanh"
    )
    return y, x.new_empty(0)


def quantized_linear_reasons(
    x: Tensor, weight: Tensor | PackedWeight, scales: Tensor, bias: Tensor | None = None,
    columns: Tensor | None = None, outliers: Tensor | PackedWeight | None = None, rotated: int = 1,
    activation: str = "",
) -> list[str]:  # fmt: skip
    reasons = cuda.dtype_reasons(x=x, bias=bias) + weight_reasons(weight=weight)
    reasons += [] if outliers is None or not outliers.shape[1] else weight_reasons(outliers=outliers)
    return reasons if scales.dtype == torch.float32 else [*reasons, f"scales are {scales.dtype}, not float32"]


def quantized_linear(
    x: Tensor, weight: PanelWeight, scales: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
    outliers: Any = None, rotated: int = 1, activation: str = "",
) -> Tensor:  # fmt: skip
    none = outliers is None or not outliers.shape[1]
    columns = scales.new_empty(0, dtype=torch.int64) if none or columns is None else columns.contiguous()
    panels = scales.new_empty(0, dtype=torch.bfloat16) if none else outliers.panels
    parts = [weight.panels, scales.contiguous(), weight.sums, columns, panels]
    bias = None if bias is None else bias.to(x.dtype)
    native_op = torch.ops.fastbert_native.packed_linear
    return native_op(x, parts, weight.shape[0], bias, ACTIVATIONS[activation], rotated)  # type: ignore[no-any-return]


def encoder_forward_reasons(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> list[str]:  # fmt: skip
    reasons = cuda.dtype_reasons(x=x, bias=tensors[BIAS]) + ([] if scale > 0 else [f"scale {scale} is not over 0"])
    if any(tensors[place].dim() != 4 for place in WEIGHTS):
        reasons.append("the weights are not packed for it (ops.pack_weight)")
    return reasons


def encoder_forward(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    dim, intermediate = tensors[BIAS].shape[0] // (3 * heads), tensors[WEIGHTS[2] + BIAS].shape[0]
    if any(tensors[place].dtype != torch.float32 for place in NORMS):
        tensors = [t.float() if i % TENSORS in NORMS else t for i, t in enumerate(tensors)]
    arguments = cu_seqlens, tensors, heads, dim, intermediate, scale, eps, approximate == "tanh", ROTATED
    y = torch.ops.fastbert_native.encoder_forward(x.float(), *arguments)
    return y.to(x.dtype)  # type: ignore[no-any-return]


REASONS: dict[str, Callable[..., list[str]]] = {
    reasons.__name__.removesuffix("_reasons"): reasons
    for reasons in (
        cuda.unpad_reasons, embed_layer_norm_reasons, embed_layer_norm_backward_reasons, add_layer_norm_reasons,
        add_layer_norm_backward_reasons, attention_reasons, attention_backward_reasons, linear_reasons,
        linear_gelu_reasons, feed_forward_reasons, encoder_forward_reasons, quantized_linear_reasons,
    )
}  # fmt: skip
PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": linear, "linear_gelu": linear_gelu, "feed_forward": feed_forward, "quantized_linear": quantized_linear,
}  # fmt: skip
ACTIVATIONS = {"": 0, "none": 1, "tanh": 2}  # csrc/linear.h's


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

    if name == "encoder_forward":
        return [Backend("cpu", encoder_forward, refuse, devices=("cpu",), pack=pack_weight)]
    if name in PRODUCTS:
        return [Backend("cpu", PRODUCTS[name], refuse, devices=("cpu",), pack=pack_weight)]
    return [Backend("cpu", run, refuse, devices=("cpu",))]
