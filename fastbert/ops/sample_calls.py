"""Small calls of every op with real values: for the self-check, and for what `doctor` and `explain` say.

T real tokens, B sequences, S padded length, H = heads · dim, N heads, D head dim, I intermediate size.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastbert.ops import reference
from fastbert.ops.reference import LENGTH_CLASSES

if TYPE_CHECKING:
    from fastbert.ops.registry import Op

DRAWN = 8191  # values are repeated after so many, a prime: no two rows of a tensor are alike
SEED = -(2**40) - 7  # both words of dropout's key differ from 0
MASKS, FLOATS = (torch.int64, torch.bool), (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    """What a call is made for: lengths of the sequences, heads, head dim, intermediate size."""

    lengths: tuple[int, ...]
    heads: int
    dim: int
    inner: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def hidden(self) -> int:
        return self.heads * self.dim


TYPICAL = Sizes((3, 5), 12, 64, 3072)  # BERT base's
# At, below and above the tile sizes 16, 64 and 128; one token; empty rows.
CHECKED = (Sizes((17, 0, 1, 64, 15, 33, 16), 2, 64, 256), Sizes((65, 31, 0, 128), 3, 32, 160))


@dataclass(frozen=True)
class SampleCall:
    """A call on the CPU: what is special in it, its arguments, and what gives the same in float64."""

    what: str
    arguments: tuple[Any, ...]
    exact: Callable[[], tuple[Any, ...]]


class Draw:
    """Values that are the same at every call of the same sizes, from a generator of their own."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(DRAWN, generator=self.generator, dtype=torch.float32)
        self.drawn = 0

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """From N(mean, scale²), rounded to a dtype."""
        count, start = math.prod(shape), self.drawn % DRAWN
        self.drawn += 1009
        values = (self.values * scale + mean).to(dtype or self.dtype)
        return values.repeat(-(-(start + count) // DRAWN))[start : start + count].view(shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """From 0 to high - 1."""
        return torch.randint(high, shape, generator=self.generator, dtype=torch.int64)

    def gains(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """γ and β [H]."""
        hidden = self.sizes.hidden
        return self.normal(hidden, scale=0.2, mean=1.0, dtype=dtype), self.normal(hidden, scale=0.1, dtype=dtype)

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[T, width]."""
        return self.normal(self.sizes.tokens, width, dtype=dtype)

    def weight(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Weight [n, k] and bias [n]."""
        return self.normal(n, k, scale=k**-0.5), self.normal(n, scale=0.1)

    def real(self) -> Tensor:
        """Which columns of the padded batch are real: bool [B, S]."""
        lengths = torch.tensor(self.sizes.lengths)
        return torch.arange(max(self.sizes.lengths)) < lengths[:, None]

    def bounds(self) -> Tensor:
        """cu_seqlens [B+1] int32."""
        return torch.tensor([0, *itertools.accumulate(self.sizes.lengths)], dtype=torch.int32)

    def work(self) -> tuple[Tensor, tuple[int, ...]]:
        """The sequences longest first [B] int32, and how many each class of lengths holds."""
        lengths = self.sizes.lengths
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        within = [sum(n <= most for n in lengths) for most in LENGTH_CLASSES]
        counts = itertools.pairwise((0, *within, len(lengths)))
        return torch.tensor(order, dtype=torch.int32), tuple(end - start for start, end in counts)

    def seed(self) -> Tensor:
        """[] int64."""
        return torch.tensor(SEED)


Calls = Iterator[tuple[str, tuple[Any, ...]]]


def unpad(draw: Draw) -> Calls:
    mask = draw.real() if draw.dtype == torch.bool else draw.real().to(draw.dtype) * 3  # nonzero is real
    yield "right padding", (mask,)
    yield "the number of tokens known", (mask, draw.sizes.tokens)
    yield "holes, a transposed mask", (draw.integers(2, *mask.shape).to(draw.dtype).T,)


def pad(draw: Draw) -> Calls:
    real = draw.real()
    yield "right padding", (draw.rows(draw.sizes.hidden), real.flatten().nonzero().flatten(), *real.shape)


def embed_layer_norm(draw: Draw) -> Calls:
    sizes, longest = draw.sizes, max(draw.sizes.lengths)
    ids, types = draw.integers(50, sizes.tokens), draw.integers(2, sizes.tokens)
    positions = torch.cat([torch.arange(n) for n in sizes.lengths])
    words, kinds, places = (draw.normal(n, sizes.hidden, scale=0.5) for n in (50, 2, longest))
    gains = draw.gains()
    yield "token types", (ids, types, positions, words, kinds, places, *gains, 1e-12)
    yield "no token types, saved", (
        ids, None, positions, words, None, places, *gains, 1e-5, 0.0, None, -1, -1, True,
    )  # fmt: skip
    yield "dropout", (ids, types, positions, words, kinds, places, *gains, 1e-12, 0.1, draw.seed(), 1, 0, True)


def dropout_bits(draw: Draw) -> Calls:
    sizes = draw.sizes
    for p in (0.1, 0.5):
        yield f"p = {p}", (draw.seed(), 4, draw.bounds(), sizes.tokens, max(sizes.lengths), sizes.heads, p)


def attention(draw: Draw) -> Calls:
    sizes, longest = draw.sizes, max(draw.sizes.lengths)
    qkv, scale, p = draw.normal(sizes.tokens, 3, sizes.heads, sizes.dim), sizes.dim**-0.5, 0.1
    yield "no dropout", (qkv, draw.bounds(), longest, scale)
    peaked = qkv.clone()
    peaked[:, 0] *= 2  # with more a backward from a rounded lse is as much off as an error
    yield "scores of size 2", (peaked, draw.bounds(), longest, scale)
    bits = reference.dropout_bits(draw.seed(), 0, draw.bounds(), sizes.tokens, longest, sizes.heads, p)
    bias = draw.normal(*qkv.shape[1:], scale=0.1)
    yield "longest first, a bias", (qkv, draw.bounds(), longest, scale, None, 0.0, *draw.work(), bias)
    yield "the same with dropout", (qkv, draw.bounds(), longest, scale, bits, p, *draw.work(), bias)


def add_layer_norm(draw: Draw) -> Calls:
    hidden = draw.sizes.hidden
    x, bias, residual, gains = draw.rows(hidden), draw.normal(hidden, scale=0.1), draw.rows(hidden), draw.gains()
    yield "a bias", (x, bias, residual, *gains, 1e-12)
    yield "dropout", (x, None, residual, *gains, 1e-5, 0.1, draw.seed(), 1)
    if draw.dtype != torch.float32:
        wide = torch.float32
        yield "a residual in float32", (x, None, draw.rows(hidden, wide), *draw.gains(wide), 1e-12)


def linear(draw: Draw) -> Calls:
    x, (weight, bias) = draw.rows(draw.sizes.hidden), draw.weight(3 * draw.sizes.hidden, draw.sizes.hidden)
    yield "a bias", (x, weight, bias)
    yield "no bias", (x, weight, None)


def linear_gelu(draw: Draw) -> Calls:
    x, product = draw.rows(draw.sizes.hidden), draw.weight(draw.sizes.inner, draw.sizes.hidden)
    yield "erf", (x, *product, "none", False)
    yield "tanh, saved", (x, *product, "tanh", True)


def feed_forward(draw: Draw) -> Calls:
    hidden, inner = draw.sizes.hidden, draw.sizes.inner
    x, products = draw.rows(hidden), (*draw.weight(inner, hidden), *draw.weight(hidden, inner))
    yield "erf", (x, *products, "none", False)
    yield "tanh, saved", (x, *products, "tanh", True)


def bias_gelu(draw: Draw) -> Calls:
    inner = draw.sizes.inner
    x, bias = draw.rows(inner), draw.normal(inner, scale=0.5)
    yield "erf", (x, bias, "none")
    yield "tanh, no bias", (x, None, "tanh")


def encoder_forward(draw: Draw) -> Calls:
    sizes, hidden, inner, none = draw.sizes, draw.sizes.hidden, draw.sizes.inner, torch.empty(0)

    def product(n: int, k: int) -> tuple[Tensor, ...]:
        weight, bias = draw.weight(n, k)
        return weight, *[none] * 4, bias

    layer = (
        *product(3 * hidden, hidden), *product(hidden, hidden), *draw.gains(), *product(inner, hidden),
        *product(hidden, inner), *draw.gains(),
    )  # fmt: skip
    call = draw.rows(hidden), draw.bounds(), max(sizes.lengths), list(layer), sizes.heads, sizes.dim**-0.5, 1e-12
    yield "a layer", (*call, "none")
    yield "tanh", (*call, "tanh")


def quantized_linear(draw: Draw) -> Calls:
    hidden, inner = draw.sizes.hidden, draw.sizes.inner
    x, weight = draw.rows(hidden), (draw.integers(255, inner, hidden) - 127).to(torch.int8)
    scales, bias = draw.normal(inner, scale=1e-3, mean=5e-3, dtype=torch.float32), draw.normal(inner, scale=0.1)
    yield "a bias", (x, weight, scales, bias)
    yield "erf", (x, weight, scales, bias, None, None, 1, "none")
    columns = torch.tensor([3, hidden - 1])
    outliers = draw.normal(inner, 2, scale=hidden**-0.5, dtype=torch.bfloat16)
    weight, x = weight.index_fill(1, columns, 0), x.clone()
    x[:, columns] *= 100
    yield "columns of outliers, no bias", (x, weight, scales, None, columns, outliers)
    yield "the same rotated, a bias, tanh", (x, weight, scales, bias, columns, outliers, 8, "tanh")


MAKERS: dict[str, Callable[[Draw], Calls]] = {
    maker.__name__: maker
    for maker in (
        unpad, pad, embed_layer_norm, dropout_bits, attention, add_layer_norm, linear, linear_gelu, feed_forward,
        bias_gelu, encoder_forward, quantized_linear,
    )
}  # fmt: skip


def sample_calls(op: Op, sizes: Sizes, dtype: torch.dtype) -> Iterator[SampleCall]:
    """The calls of an op whose main input has this dtype; of a backward, those that its op's calls lead to.

    What a backward is handed of its op's outputs are PyTorch's in the dtype, and the reference's in float64.
    """
    draw, forward = Draw(sizes, dtype), op.forward or op
    for what, arguments in MAKERS[forward.name](draw):
        if op is forward:
            yield SampleCall(what, arguments, functools.partial(widened, arguments))
            continue
        found = outputs(forward.backends["torch"].run(*arguments))
        grad = draw.normal(*found[0].shape, dtype=found[0].dtype)
        exact = functools.partial(exact_backward, forward, arguments, grad)
        yield SampleCall(what, backward_arguments(forward, arguments, found, grad), exact)


def exact_backward(op: Op, arguments: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """The arguments of an op's backward in float64, what its forward saves too."""
    arguments = widened(arguments)
    found = outputs(op.backends["reference"].run(*arguments))
    return backward_arguments(op, arguments, found, grad.double())


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with floating tensors in float64."""

    def wide(a: Any) -> Any:
        if isinstance(a, list):
            return [wide(one) for one in a]
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(wide(a) for a in arguments)


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def backward_arguments(op: Op, arguments: tuple[Any, ...], found: tuple[Tensor, ...], grad: Tensor) -> tuple[Any, ...]:
    """What autograd hands to the backward of `op(*arguments)`, which returned `found`, every gradient needed."""
    assert op.gradient is not None
    bound = inspect.signature(op.backends["reference"].run).bind(*arguments)
    bound.apply_defaults()
    known = bound.arguments | dict(zip(op.returns(), found, strict=True))
    known["needed"] = [known[name] is not None for name in op.gradient.of]
    return (grad, *(known[name] for name in op.gradient.op.arguments()[1:]))


def dtypes(op: Op) -> tuple[torch.dtype, ...]:
    """The dtypes of an op's main input: a mask's, a seed's, or those that models compute in."""
    return {"unpad": MASKS, "dropout_bits": (torch.int64,)}.get(op.name, FLOATS)
