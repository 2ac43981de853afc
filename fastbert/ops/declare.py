"""Every op, declared once: schema, fake, backends. Adding one: CONTRIBUTING.md, "Adding an op"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import builtins, reference
from fastbert.ops.cpu import PRODUCTS, cpu_backends
from fastbert.ops.cuda import cuda_backends
from fastbert.ops.encoder import TENSORS
from fastbert.ops.kernels import triton_backend
from fastbert.ops.packed import PackedWeight
from fastbert.ops.reference import LENGTH_CLASSES, statistics_dtype
from fastbert.ops.registry import Backend, Gradient, Op

# On GPUs Triton's kernels of these ops are tried before PyTorch's built-ins, those of the others behind. Unmeasured:
# what is first spares memory traffic on paper; of the products nobody knows yet where they beat cuBLAS.
TRITON_FIRST = ("embed_layer_norm", "dropout_bits", "attention", "add_layer_norm")
WITHOUT_TRITON = ("encoder_forward", "quantized_linear")


def declare(name: str, schema: str, fake: Any, check: Any, gradient: Gradient | None = None) -> Op:
    """An op with "torch", "triton" (but for WITHOUT_TRITON), "reference"; "cpu" before and "cuda" behind, if there.

    No CUDA kernel was measured yet: on a GPU one runs where it is asked for, or where all before it refuse.
    """
    op = Op(name, schema, fake, check, gradient)
    pack = builtins.pack_weight if name in PRODUCTS and name != "quantized_linear" else None
    usual = [Backend("torch", getattr(builtins, name), pack=pack)]
    if name not in WITHOUT_TRITON:
        usual.append(triton_backend(name))
    if name.removesuffix("_backward") in TRITON_FIRST:
        usual.reverse()
    for backend in (*cpu_backends(name), *usual, *cuda_backends(name), Backend("reference", getattr(reference, name))):
        op.add(backend)
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


def dropout_reasons(p: float, given: Tensor | None, what: str) -> list[str]:
    """In words, why dropout with probability p cannot be done with what was given for it (a seed, keep bits)."""
    reasons = [] if 0 <= p <= 1 else [f"p = {p} is no probability"]
    if p == 0.0 if given is not None else p != 0.0:
        reasons.append(f"p = {p} and {what} {'missing' if given is None else 'given'}: dropout needs both")
    return reasons


def seed_reasons(p: float, seed: Tensor | None) -> list[str]:
    """In words, what is wrong with the seed of hidden dropout."""
    reasons = dropout_reasons(p, seed, "seed")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        reasons.append(f"seed is {seed.dtype} {list(seed.shape)}, expected one int64")
    return reasons


def like_needed(needed: list[bool], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Empty gradients of the shapes of these tensors, and of shape [0] where they are not needed or there is none."""
    some = next(t for t in tensors if t is not None)
    return tuple(
        some.new_empty(0) if t is None else t.new_empty(t.shape if wanted else 0)
        for t, wanted in zip(tensors, needed, strict=True)
    )


# unpad


def check_unpad(mask: Tensor, tokens: int = -1) -> list[str]:
    return shape_reasons(mask=(mask, (None, None)))


def fake_unpad(mask: Tensor, tokens: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    size, batch = torch.library.get_ctx().new_dynamic_size() if tokens < 0 else tokens, mask.shape[0]
    bounds, order = (mask.new_empty(n, dtype=torch.int32) for n in (batch + 1, batch))
    return mask.new_empty(size, dtype=torch.int64), bounds, order


unpad = declare(
    "unpad",
    "(Tensor mask, SymInt tokens=-1) -> (Tensor indices, Tensor cu_seqlens, Tensor order)",
    fake_unpad,
    check_unpad,
)

# pad


def check_pad(x: Tensor, indices: Tensor, batch: int, length: int) -> list[str]:
    return shape_reasons(x=(x, (None, None)), indices=(indices, (x.shape[0],))) + integer_reasons(indices=indices)


def fake_pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    return x.new_empty(batch, length, x.shape[1])


def check_pad_backward(grad: Tensor, indices: Tensor) -> list[str]:
    reasons = shape_reasons(grad=(grad, (None, None, None)), indices=(indices, (None,)))
    return reasons + integer_reasons(indices=indices)


def fake_pad_backward(grad: Tensor, indices: Tensor) -> Tensor:
    return grad.new_empty(indices.shape[0], grad.shape[2])


pad_backward = declare(
    "pad_backward", "(Tensor grad, Tensor indices) -> Tensor x", fake_pad_backward, check_pad_backward
)

pad = declare(
    "pad",
    "(Tensor x, Tensor indices, SymInt batch, SymInt length) -> Tensor out",
    fake_pad,
    check_pad,
    Gradient(pad_backward, of=("x",)),
)

# embed_layer_norm


def check_embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None,
    word_padding: int = -1, position_padding: int = -1, save: bool = False,
) -> list[str]:  # fmt: skip
    tokens, hidden = ids.shape[0], words.shape[-1]
    reasons = shape_reasons(
        ids=(ids, (None,)), types=(types, (tokens,)), positions=(positions, (tokens,)), words=(words, (None, hidden)),
        type_table=(type_table, (None, hidden)), position_table=(position_table, (None, hidden)),
        gamma=(gamma, (hidden,)), beta=(beta, (hidden,)),
    )  # fmt: skip
    if types is not None and type_table is None:
        reasons.append("types are given without a type_table")
    return reasons + integer_reasons(ids=ids, types=types, positions=positions) + seed_reasons(p, seed)


def fake_embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None,
    word_padding: int = -1, position_padding: int = -1, save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (words.new_empty(ids.shape[0], dtype=statistics_dtype(words)) for _ in range(2))
    y = words.new_empty(ids.shape[0], words.shape[1])
    return y, mean, rstd, torch.empty_like(y) if save else words.new_empty(0)


def check_embed_layer_norm_backward(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, p: float, seed: Tensor | None,
    word_padding: int, position_padding: int, needed: list[bool],
) -> list[str]:  # fmt: skip
    tokens, hidden = ids.shape[0], words.shape[-1]
    reasons = shape_reasons(grad=(grad, (tokens, hidden)), mean=(mean, (tokens,)), rstd=(rstd, (tokens,)))
    reasons += shape_reasons(pre=(pre, (tokens, hidden) if pre.dim() == 2 else (0,)))
    forward = ids, types, positions, words, type_table, position_table, gamma, gamma, 0.0, p, seed
    return reasons + check_embed_layer_norm(*forward)


def fake_embed_layer_norm_backward(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, p: float, seed: Tensor | None,
    word_padding: int, position_padding: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return like_needed(needed, words, type_table, position_table, gamma, gamma)


embed_layer_norm_backward = declare(
    "embed_layer_norm_backward",
    "(Tensor grad, Tensor ids, Tensor? types, Tensor positions, Tensor words, Tensor? type_table,"
    " Tensor position_table, Tensor gamma, Tensor mean, Tensor rstd, Tensor pre, float p, Tensor? seed,"
    " int word_padding, int position_padding, bool[] needed)"
    " -> (Tensor words_grad, Tensor type_table_grad, Tensor position_table_grad, Tensor gamma_grad, Tensor beta_grad)",
    fake_embed_layer_norm_backward,
    check_embed_layer_norm_backward,
)

embed_layer_norm = declare(
    "embed_layer_norm",
    "(Tensor ids, Tensor? types, Tensor positions, Tensor words, Tensor? type_table, Tensor position_table,"
    " Tensor gamma, Tensor beta, float eps, float p=0.0, Tensor? seed=None, int word_padding=-1,"
    " int position_padding=-1, bool save=False) -> (Tensor y, Tensor mean, Tensor rstd, Tensor pre)",
    fake_embed_layer_norm,
    check_embed_layer_norm,
    Gradient(
        embed_layer_norm_backward,
        of=("words", "type_table", "position_table", "gamma", "beta"),
        unread=("words", "type_table", "position_table"),
    ),
)

# dropout_bits


def check_dropout_bits(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> list[str]:
    reasons = shape_reasons(cu_seqlens=(cu_seqlens, (None,))) + (seed_reasons(p, seed) if p else [])
    return reasons if cu_seqlens.dtype == torch.int32 else [*reasons, f"cu_seqlens is {cu_seqlens.dtype}, not int32"]


def fake_dropout_bits(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> Tensor:
    return seed.new_empty(heads, tokens, (max_seqlen + 31) // 32, dtype=torch.int32)


dropout_bits = declare(
    "dropout_bits",
    "(Tensor seed, int site, Tensor cu_seqlens, SymInt tokens, SymInt max_seqlen, int heads, float p) -> Tensor bits",
    fake_dropout_bits,
    check_dropout_bits,
)

# attention


def check_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> list[str]:  # fmt: skip
    reasons = shape_reasons(qkv=(qkv, (None, 3, None, None)), cu_seqlens=(cu_seqlens, (None,)))
    if not reasons:
        words = (max_seqlen + 31) // 32
        reasons += shape_reasons(keep_bits=(keep_bits, (qkv.shape[2], qkv.shape[0], words)))
        reasons += shape_reasons(bias=(bias, tuple(qkv.shape[1:])))
    if bias is not None and bias.dtype != qkv.dtype:
        reasons.append(f"qkv is {qkv.dtype} and bias is {bias.dtype}")
    if cu_seqlens.dtype != torch.int32:
        reasons.append(f"cu_seqlens is {cu_seqlens.dtype}, expected int32")
    return reasons + dropout_reasons(p, keep_bits, "keep_bits") + order_reasons(order, classes, cu_seqlens)


def order_reasons(order: Tensor | None, classes: Sequence[int], cu_seqlens: Tensor) -> list[str]:
    """In words, what is wrong with the order of the sequences and with how many of them each length class holds."""
    if order is None:
        return ["classes are given without an order"] if classes else []
    batch = cu_seqlens.shape[0] - 1
    reasons = shape_reasons(order=(order, (batch,)))
    if order.dtype != torch.int32:
        reasons.append(f"order is {order.dtype}, expected int32")
    if len(classes) != len(LENGTH_CLASSES) + 1 or sum(classes) != batch:
        reasons.append(
            f"classes are {list(classes)}, expected {len(LENGTH_CLASSES) + 1} numbers that add up to {batch}"
        )
    return reasons


def fake_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, _, heads, dim = qkv.shape
    return qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=statistics_dtype(qkv))


def check_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    keep_bits: Tensor | None, p: float, order: Tensor | None, classes: Sequence[int], needed: list[bool],
) -> list[str]:  # fmt: skip
    if reasons := check_attention(qkv, cu_seqlens, max_seqlen, scale, keep_bits, p, order, classes):
        return reasons
    tokens, _, heads, dim = qkv.shape
    shape = tokens, heads, dim
    return shape_reasons(grad=(grad, shape), out=(out, shape), lse=(lse, (heads, tokens)))


def fake_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    keep_bits: Tensor | None, p: float, order: Tensor | None, classes: Sequence[int], needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return like_needed(needed, qkv, qkv.new_empty(qkv.shape[1:]))


attention_backward = declare(
    "attention_backward",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale,"
    " Tensor? keep_bits, float p, Tensor? order, int[] classes, bool[] needed)"
    " -> (Tensor qkv_grad, Tensor bias_grad)",
    fake_attention_backward,
    check_attention_backward,
)

attention = declare(
    "attention",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, Tensor? keep_bits=None, float p=0.0,"
    " Tensor? order=None, int[] classes=[], Tensor? bias=None) -> (Tensor out, Tensor lse)",
    fake_attention,
    check_attention,
    Gradient(attention_backward, of=("qkv", "bias")),
)

# add_layer_norm


def check_add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
    seed: Tensor | None = None, site: int = 0,
) -> list[str]:  # fmt: skip
    hidden = (x.shape[-1],)
    reasons = shape_reasons(x=(x, (None, None)), bias=(bias, hidden), gamma=(gamma, hidden), beta=(beta, hidden))
    reasons = reasons or shape_reasons(residual=(residual, tuple(x.shape)))
    return reasons + seed_reasons(p, seed)


def fake_add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
    seed: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (residual.new_empty(residual.shape[0], dtype=statistics_dtype(residual)) for _ in range(2))
    return torch.empty_like(residual), mean, rstd


def check_add_layer_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Tensor | None, site: int, needed: list[bool],
) -> list[str]:  # fmt: skip
    rows = (x.shape[0],)
    reasons = shape_reasons(grad=(grad, tuple(x.shape)), mean=(mean, rows), rstd=(rstd, rows))
    return reasons + check_add_layer_norm(x, bias, residual, gamma, gamma, 0.0, p, seed, site)


def fake_add_layer_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Tensor | None, site: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return like_needed(needed, x, bias, residual, gamma, gamma)


add_layer_norm_backward = declare(
    "add_layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor mean, Tensor rstd, float p,"
    " Tensor? seed, int site, bool[] needed)"
    " -> (Tensor x_grad, Tensor bias_grad, Tensor residual_grad, Tensor gamma_grad, Tensor beta_grad)",
    fake_add_layer_norm_backward,
    check_add_layer_norm_backward,
)

add_layer_norm = declare(
    "add_layer_norm",
    "(Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor beta, float eps, float p=0.0, Tensor? seed=None,"
    " int site=0) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake_add_layer_norm,
    check_add_layer_norm,
    Gradient(add_layer_norm_backward, of=("x", "bias", "residual", "gamma", "beta")),
)

# linear


def check_linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> list[str]:
    reasons = shape_reasons(x=(x, (None, None)), weight=(weight, (None, x.shape[-1])))
    reasons = reasons or shape_reasons(bias=(bias, (weight.shape[0],)))
    return reasons if weight.dtype == x.dtype else [*reasons, f"x is {x.dtype} and weight is {weight.dtype}"]


def fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def check_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> list[str]:
    return check_linear(x, weight) or shape_reasons(grad=(grad, (x.shape[0], weight.shape[0])))


def fake_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    return like_needed(needed, x, weight, weight[:, 0])


linear_backward = declare(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool[] needed) -> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad)",
    fake_linear_backward,
    check_linear_backward,
)

linear = declare(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor y",
    fake_linear,
    check_linear,
    Gradient(linear_backward, of=("x", "weight", "bias")),
)

# linear_gelu


def approximate_reasons(approximate: str) -> list[str]:
    known = approximate in ("none", "tanh")
    return [] if known else [f"approximate is {approximate!r}, expected 'none' (erf) or 'tanh'"]


def check_linear_gelu(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> list[str]:
    return check_linear(x, weight, bias) + approximate_reasons(approximate)


def fake_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if save else x.new_empty(0)


def check_linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> list[str]:
    reasons = check_linear_gelu(x, weight, bias, approximate)
    shape = x.shape[0], weight.shape[0]
    return reasons or shape_reasons(grad=(grad, shape), pre=(pre, shape if pre.dim() == 2 else (0,)))


def fake_linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    return like_needed(needed, x, weight, weight[:, 0])


linear_gelu_backward = declare(
    "linear_gelu_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str approximate, bool[] needed)"
    " -> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad)",
    fake_linear_gelu_backward,
    check_linear_gelu_backward,
)

linear_gelu = declare(
    "linear_gelu",
    '(Tensor x, Tensor weight, Tensor? bias=None, str approximate="none", bool save=False) -> (Tensor y, Tensor pre)',
    fake_linear_gelu,
    check_linear_gelu,
    Gradient(linear_gelu_backward, of=("x", "weight", "bias"), unread=("bias",)),
)

# feed_forward


def check_feed_forward(
    x: Tensor, w1: Tensor | PackedWeight, b1: Tensor | None, w2: Tensor | PackedWeight, b2: Tensor | None,
    approximate: str = "none", save: bool = False,
) -> list[str]:  # fmt: skip
    reasons = check_linear_gelu(x, w1, b1, approximate)
    reasons = reasons or shape_reasons(w2=(w2, (None, w1.shape[0])), b2=(b2, (w2.shape[0],)))
    return reasons if w2.dtype == x.dtype else [*reasons, f"x is {x.dtype} and w2 is {w2.dtype}"]


def fake_feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pre = x.new_empty(x.shape[0], w1.shape[0]) if save else x.new_empty(0)
    return x.new_empty(x.shape[0], w2.shape[0]), pre


def check_feed_forward_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> list[str]:  # fmt: skip
    if reasons := check_feed_forward(x, w1, b1, w2, None, approximate):
        return reasons
    saved = (x.shape[0], w1.shape[0]) if pre.dim() == 2 else (0,)
    return shape_reasons(grad=(grad, (x.shape[0], w2.shape[0])), pre=(pre, saved))


def fake_feed_forward_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return like_needed(needed, x, w1, w1[:, 0], w2, w2[:, 0])


feed_forward_backward = declare(
    "feed_forward_backward",
    "(Tensor grad, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor pre, str approximate, bool[] needed)"
    " -> (Tensor x_grad, Tensor w1_grad, Tensor b1_grad, Tensor w2_grad, Tensor b2_grad)",
    fake_feed_forward_backward,
    check_feed_forward_backward,
)

feed_forward = declare(
    "feed_forward",
    '(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str approximate="none", bool save=False)'
    " -> (Tensor y, Tensor pre)",
    fake_feed_forward,
    check_feed_forward,
    Gradient(feed_forward_backward, of=("x", "w1", "b1", "w2", "b2"), unread=("b1",)),
)

# bias_gelu


def check_bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> list[str]:
    reasons = shape_reasons(x=(x, (None, None)))
    reasons = reasons or shape_reasons(bias=(bias, (x.shape[1],))) + approximate_reasons(approximate)
    if bias is not None and bias.dtype != x.dtype:
        reasons.append(f"x is {x.dtype} and bias is {bias.dtype}")
    return reasons


def fake_bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return x.new_empty(x.shape)


def check_bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> list[str]:
    return check_bias_gelu(x, bias, approximate) or shape_reasons(grad=(grad, tuple(x.shape)))


def fake_bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    return like_needed(needed, x, bias)


bias_gelu_backward = declare(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor? bias, str approximate, bool[] needed) -> (Tensor x_grad, Tensor bias_grad)",
    fake_bias_gelu_backward,
    check_bias_gelu_backward,
)

bias_gelu = declare(
    "bias_gelu",
    '(Tensor x, Tensor? bias=None, str approximate="none") -> Tensor y',
    fake_bias_gelu,
    check_bias_gelu,
    Gradient(bias_gelu_backward, of=("x", "bias")),
)

# encoder_forward


def check_encoder_forward(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> list[str]:  # fmt: skip
    reasons = shape_reasons(x=(x, (None, None)), cu_seqlens=(cu_seqlens, (None,))) + approximate_reasons(approximate)
    if not tensors or len(tensors) % TENSORS:
        reasons.append(f"there are {len(tensors)} tensors, expected {TENSORS} a layer")
    if cu_seqlens.dtype != torch.int32:
        reasons.append(f"cu_seqlens is {cu_seqlens.dtype}, expected int32")
    return reasons


def fake_encoder_forward(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, tensors: Sequence[Tensor], heads: int, scale: float, eps: float,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


encoder_forward = declare(
    "encoder_forward",
    "(Tensor x, Tensor cu_seqlens, SymInt max_seqlen, Tensor[] tensors, int heads, float scale, float eps,"
    ' str approximate="none") -> Tensor y',
    fake_encoder_forward,
    check_encoder_forward,
)

# quantized_linear


def check_quantized_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
    outliers: Tensor | None = None, rotated: int = 1, activation: str = "",
) -> list[str]:  # fmt: skip
    reasons = shape_reasons(x=(x, (None, None)), weight=(weight, (None, x.shape[-1])), columns=(columns, (None,)))
    if not reasons:
        rows, wide = weight.shape[0], None if columns is None else columns.shape[0]
        reasons += shape_reasons(scales=(scales, (rows,)), bias=(bias, (rows,)), outliers=(outliers, (rows, wide)))
    if (columns is None) != (outliers is None):
        reasons.append("columns and outliers are given together or not at all")
    if weight.dtype != torch.int8:
        reasons.append(f"weight is {weight.dtype}, expected int8")
    dtypes = {n: t.dtype for n, t in (("x", x), ("scales", scales), ("bias", bias)) if t is not None}
    reasons += [f"{name} is {dtype}, no float" for name, dtype in dtypes.items() if not dtype.is_floating_point]
    known = activation in ("", "none", "tanh")
    reasons += [] if known else [f"activation is {activation!r}, expected '', 'none' (erf GELU) or 'tanh'"]
    if rotated < 1 or rotated & (rotated - 1) or x.shape[-1] % rotated:
        reasons.append(f"rotated is {rotated}, expected a power of two that divides {x.shape[-1]}")
    if columns is not None and columns.dtype != torch.int64:
        reasons.append(f"columns is {columns.dtype}, expected int64")
    if outliers is not None and outliers.dtype != torch.bfloat16:
        reasons.append(f"outliers is {outliers.dtype}, expected bfloat16")
    return reasons


def fake_quantized_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
    outliers: Tensor | None = None, rotated: int = 1, activation: str = "",
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0])


quantized_linear = declare(
    "quantized_linear",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? bias=None, Tensor? columns=None, Tensor? outliers=None,"
    ' int rotated=1, str activation="") -> Tensor y',
    fake_quantized_linear,
    check_quantized_linear,
)

FORWARD: tuple[Op, ...] = (
    unpad, pad, embed_layer_norm, dropout_bits, attention, add_layer_norm, linear, linear_gelu, feed_forward, bias_gelu,
    encoder_forward, quantized_linear,
)  # fmt: skip
BACKWARD: tuple[Op, ...] = tuple(op.gradient.op for op in FORWARD if op.gradient is not None)
ALL: tuple[Op, ...] = FORWARD + BACKWARD
