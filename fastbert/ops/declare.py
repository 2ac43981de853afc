"""Every op, declared once: schema, fake, backends. Adding one: CONTRIBUTING.md, "Adding an op"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import native
from fastbert.ops import builtins, reference
from fastbert.ops.packed import PackedWeight
from fastbert.ops.reference import statistics_dtype
from fastbert.ops.registry import Backend, Op


def declare(name: str, schema: str, fake: Any, check: Any, refuse: Any = None, first: tuple[Backend, ...] = ()) -> Op:
    """An op with the two backends that every op has, tried after those of `first`; `refuse`: what neither can do."""
    op = Op(name, schema, fake, check)
    for backend in first:
        op.add(backend)
    op.add(Backend("torch", getattr(builtins, name), refuse))
    op.add(Backend("reference", getattr(reference, name), refuse))
    return op


def shape_reasons(**expected: tuple[Tensor | PackedWeight | None, tuple[int | None, ...]]) -> list[str]:
    """In words, which of the named tensors differ from the shape expected of them (None in a shape: any size)."""
    reasons = []
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape and not has_shape(tensor.shape, shape):
            sizes = ", ".join("any" if n is None else str(n) for n in shape)
            reasons.append(f"{name} has shape {list(tensor.shape)}, expected [{sizes}]")
    return reasons


def has_shape(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is the expected one, where None stands for any size."""
    if len(got) != len(expected):
        return False
    for n, m in zip(got, expected, strict=True):  # noqa: SIM110 - a generator would double the time of a check
        if m is not None and n != m:
            return False
    return True


def integer_reasons(**tensors: Tensor | None) -> list[str]:
    """In words, which of the named tensors do not hold integers that can index."""
    return [
        f"{name} is {tensor.dtype}, expected int64 or int32"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32)
    ]


def refuse_hidden_dropout(p: float) -> list[str]:
    return [f"hidden dropout p = {p} needs the op dropout_bits, which no backend has yet"] if p else []


# unpad


def check_unpad(mask: Tensor) -> list[str]:
    return shape_reasons(mask=(mask, (None, None)))


def fake_unpad(mask: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty(tokens, dtype=torch.int64), mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


def refuse_native_unpad(mask: Tensor) -> list[str]:
    reasons = native.refuse(mask.device.type)
    return (
        reasons if mask.dtype in native.MASK_DTYPES else [*reasons, f"the native unpad takes no mask of {mask.dtype}"]
    )


unpad = declare(
    "unpad",
    "(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)",
    fake_unpad,
    check_unpad,
    first=(Backend("cpu", native.unpad, refuse_native_unpad, devices=("cpu",)),),
)
unpad.add(Backend("cuda", native.unpad, refuse_native_unpad, devices=("cuda",)))  # unmeasured: behind "torch"

# pad


def check_pad(x: Tensor, indices: Tensor, batch: int, length: int) -> list[str]:
    return shape_reasons(x=(x, (None, None)), indices=(indices, (x.shape[0],))) + integer_reasons(indices=indices)


def fake_pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    return x.new_empty(batch, length, x.shape[1])


pad = declare("pad", "(Tensor x, Tensor indices, SymInt batch, SymInt length) -> Tensor", fake_pad, check_pad)

# embed_layer_norm


def check_embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
) -> list[str]:  # fmt: skip
    tokens, hidden = ids.shape[0], words.shape[-1]
    reasons = shape_reasons(
        ids=(ids, (None,)), types=(types, (tokens,)), positions=(positions, (tokens,)), words=(words, (None, hidden)),
        type_table=(type_table, (None, hidden)), position_table=(position_table, (None, hidden)),
        gamma=(gamma, (hidden,)), beta=(beta, (hidden,)),
    )  # fmt: skip
    if types is not None and type_table is None:
        reasons.append("types are given without a type_table")
    return reasons + integer_reasons(ids=ids, types=types, positions=positions)


def fake_embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
) -> Tensor:  # fmt: skip
    return words.new_empty(ids.shape[0], words.shape[1])


def refuse_embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
) -> list[str]:  # fmt: skip
    return refuse_hidden_dropout(p)


embed_layer_norm = declare(
    "embed_layer_norm",
    "(Tensor ids, Tensor? types, Tensor positions, Tensor words, Tensor? type_table, Tensor position_table,"
    " Tensor gamma, Tensor beta, float eps, float p=0.0) -> Tensor",
    fake_embed_layer_norm,
    check_embed_layer_norm,
    refuse_embed_layer_norm,
)

# attention


def check_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0
) -> list[str]:
    reasons = shape_reasons(qkv=(qkv, (None, 3, None, None)), cu_seqlens=(cu_seqlens, (None,)))
    if not reasons:
        words = -(-max_seqlen // 32)
        reasons += shape_reasons(keep_bits=(keep_bits, (qkv.shape[2], qkv.shape[0], words)))
    if cu_seqlens.dtype != torch.int32:
        reasons.append(f"cu_seqlens is {cu_seqlens.dtype}, expected int32")
    if (keep_bits is None) != (p == 0.0):
        reasons.append(f"p = {p} and keep_bits {'missing' if keep_bits is None else 'given'}: dropout needs both")
    return reasons


def fake_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, dim = qkv.shape
    return qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=statistics_dtype(qkv))


attention = declare(
    "attention",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, Tensor? keep_bits=None, float p=0.0)"
    " -> (Tensor out, Tensor lse)",
    fake_attention,
    check_attention,
)

# add_layer_norm


def check_add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0
) -> list[str]:
    hidden = (x.shape[-1],)
    reasons = shape_reasons(x=(x, (None, None)), bias=(bias, hidden), gamma=(gamma, hidden), beta=(beta, hidden))
    return reasons or shape_reasons(residual=(residual, tuple(x.shape)))


def fake_add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (residual.new_empty(residual.shape[0], dtype=statistics_dtype(residual)) for _ in range(2))
    return torch.empty_like(residual), mean, rstd


def refuse_add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0
) -> list[str]:
    return refuse_hidden_dropout(p)


add_layer_norm = declare(
    "add_layer_norm",
    "(Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor beta, float eps, float p=0.0)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    fake_add_layer_norm,
    check_add_layer_norm,
    refuse_add_layer_norm,
)

# linear, linear_gelu, feed_forward


def check_linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none"
) -> list[str]:
    reasons = shape_reasons(x=(x, (None, None)), weight=(weight, (None, x.shape[-1])))
    reasons = reasons or shape_reasons(bias=(bias, (weight.shape[0],)))
    if weight.dtype != x.dtype:
        reasons.append(f"x is {x.dtype} and weight is {weight.dtype}")
    if approximate not in ("none", "tanh"):
        reasons.append(f"approximate is {approximate!r}, expected 'none' (erf) or 'tanh'")
    return reasons


def fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


linear = declare("linear", "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", fake_linear, check_linear)

linear_gelu = declare(
    "linear_gelu",
    '(Tensor x, Tensor weight, Tensor? bias=None, str approximate="none") -> Tensor',
    fake_linear,
    check_linear,
)


def check_feed_forward(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none",
) -> list[str]:  # fmt: skip
    reasons = check_linear(x, w1, b1, approximate)
    reasons = reasons or shape_reasons(w2=(w2, (None, w1.shape[0])), b2=(b2, (w2.shape[0],)))
    return reasons if w2.dtype == x.dtype else [*reasons, f"x is {x.dtype} and w2 is {w2.dtype}"]


def fake_feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none"
) -> Tensor:
    return x.new_empty(x.shape[0], w2.shape[0])


feed_forward = declare(
    "feed_forward",
    '(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str approximate="none") -> Tensor',
    fake_feed_forward,
    check_feed_forward,
)

ALL: tuple[Op, ...] = (unpad, pad, embed_layer_norm, attention, add_layer_norm, linear, linear_gelu, feed_forward)
