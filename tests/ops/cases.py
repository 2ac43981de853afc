"""The one case list of the op tests, and what each op is called with and compared with.

T real tokens, H = heads · dim, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import stock
from fastbert import ops
from fastbert.ops import reference
from tests.ops import philox

SEED = -(2**40) - 7  # both words of the key differ from 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
STEPS = {"float32": 2**-24, "bfloat16": 2**-9, "float16": 2**-12}


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    heads: int
    dim: int
    intermediate: int
    why: str

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def hidden(self) -> int:
        return self.heads * self.dim

    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("edges", (17, 1, 128, 0, 65, 16, 64, 127, 15, 63), 2, 32, 256,
         "one below, at and above the tile sizes 16, 64 and 128; one token; an empty row in the middle; unsorted"),
    Case("long", (512, 511), 1, 64, 64, "as many tokens as BERT has positions, and one less"),
    Case("minilm", (3, 30, 17), 12, 32, 1536, "MiniLM's sizes: head dim 32"),
    Case("base", (17, 5), 12, 64, 3072, "BERT base's sizes"),
    Case("large", (9,), 16, 64, 4096, "BERT large's sizes, one short sequence"),
    Case("one", (1,), 4, 64, 1024, "one token alone, a softmax of one score; the sizes of bert-mini"),
    Case("equal", (16, 16, 16, 8, 16), 2, 64, 128, "neighbours of equal length, which a backend may run together"),
    Case("odd", (33, 31), 3, 33, 131, "head dim, hidden and intermediate size that no vector width divides"),
    Case("narrow", (5, 2), 1, 8, 8, "rows narrower than a vector register"),
    Case("empty_ends", (0, 7, 0), 2, 16, 64, "the first and the last row are empty"),
)  # fmt: skip
NO_TOKENS = Case("no_tokens", (0, 0), 2, 16, 64, "nothing but padding: T = 0")


def normal(*shape: int, like: str, scale: float = 1.0) -> torch.Tensor:
    """Draws from N(0, scale²) that depend on `like` alone, in float64."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(like)) % 2**31
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Spec:
    """What an op is tested with.

    Args:
        inputs: case → (name, arguments in float64) of each call; dtype-dependent ones take the dtype.
        stock: the formula as HuggingFace or torch.nn writes it, in the dtype of its inputs: `base` of the rule.
            Nothing of fastbert stands in it.
        weights: which arguments are matrices that a backend may want packed.
        rows: which arguments have a row a token, for the tests that change one sequence.
    """

    op: ops.Op
    inputs: Callable[[Case, torch.dtype], Iterator[tuple[str, Arguments]]]
    stock: Callable[..., Any]
    weights: tuple[int, ...] = ()
    rows: tuple[int, ...] = (0,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.op.returns()

    def elementwise(self, output: str) -> bool:
        """Whether an output, or a gradient ("x_grad"), is judged per binade."""
        op = self.op.gradient.op if output not in self.outputs else self.op
        return output in stock.ELEMENTWISE.get(op.name, ())

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.op.name)


def cast(arguments: Arguments, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    """Floating tensors in `dtype`, all tensors on `device`, those in lists too.

    What is float32 beside 16-bit ones stays so (scales), and what is bfloat16 (columns of outliers).
    """

    def one(a: Any) -> Any:
        if isinstance(a, list):
            return [one(inner) for inner in a]
        if not isinstance(a, torch.Tensor):
            return a
        return a.to(device, dtype) if is_rounded(a, dtype) else a.to(device)

    return tuple(one(a) for a in arguments)


def is_rounded(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    narrower = {torch.float32: (torch.bfloat16,), torch.float16: (torch.bfloat16, torch.float32)}
    stays = narrower.get(dtype, (torch.float32,) if dtype.itemsize == 2 else ())
    return tensor.is_floating_point() and tensor.dtype not in stays


# attention


def attention_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    qkv = normal(case.tokens, 3, case.heads, case.dim, like=f"qkv {case}")
    yield "", (qkv, case.cu_seqlens(), max(case.lengths), case.dim**-0.5)
    peaked = qkv.clone()
    peaked[:, 0] *= 8  # scores of size 8: nearly one-hot softmax rows
    yield "peaked", (peaked, case.cu_seqlens(), max(case.lengths), case.dim**-0.5)
    p = 0.1
    bits = philox.bits(SEED, 0, case.cu_seqlens(), max(case.lengths), case.heads, p)
    bias = normal(3, case.heads, case.dim, like="qkv bias", scale=0.1)
    yield "dropout", (qkv, case.cu_seqlens(), max(case.lengths), case.dim**-0.5, bits, p, None, (), bias)


# add_layer_norm, embed_layer_norm


def gain_and_shift(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + normal(hidden, like="gamma", scale=0.2), normal(hidden, like="beta", scale=0.1)


def add_layer_norm_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    shape, gamma_beta = (case.tokens, case.hidden), gain_and_shift(case.hidden)
    x, residual = normal(*shape, like="x"), normal(*shape, like="residual")
    bias = normal(case.hidden, like="bias", scale=0.1)
    yield "", (x, bias, residual, *gamma_beta, 1e-12)
    yield "no bias", (x, None, residual, *gamma_beta, 1e-5)
    # variance 2e-6: an eps of 1e-5 instead of 1e-12 changes them by a factor of 2.4, in every dtype
    yield "small variance", (x * 1e-3, None, residual * 1e-3, *gamma_beta, 1e-12)
    yield "variance of size eps", (x * 1e-3, None, residual * 1e-3, *gamma_beta, 1e-5)
    if case.tokens > 256:  # a row shares its mean's rounding error: base's is no measure in a few rows
        yield "large mean", (x, None, residual + 30, *gamma_beta, 1e-12)
    yield "zeros", (x * 0, None, residual * 0, *gamma_beta, 1e-12)
    yield "dropout", (x, bias, residual, *gamma_beta, 1e-12, 0.1, torch.tensor(SEED), 6)
    yield "half dropped, no bias", (x, None, residual, *gamma_beta, 1e-12, 0.5, torch.tensor(SEED), 1)


def add_layer_norm_stock(x, bias, residual, gamma, beta, eps, p=0.0, seed=None, site=0) -> tuple[torch.Tensor, ...]:
    dropout = on(x.device, philox.hidden(int(seed), site, *x.shape, p)) if p else None
    return stock.add_layer_norm_and_statistics(x, bias, residual, gamma, beta, eps, dropout)


def on(device: torch.device, dropout: tuple[torch.Tensor, float]) -> tuple[torch.Tensor, float]:
    return dropout[0].to(device), dropout[1]


def embed_layer_norm_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    def rows(most: int) -> torch.Tensor:
        return torch.cat([torch.arange(n) % most for n in case.lengths] or [torch.zeros(0, dtype=torch.int64)])

    hidden, gamma_beta = case.hidden, gain_and_shift(case.hidden)
    ids, types, positions = rows(29) * 3 % 29, rows(2), rows(512)
    words, kinds = normal(29, hidden, like="words", scale=0.02), normal(2, hidden, like="types", scale=0.02)
    places = normal(max(case.lengths) + 3, hidden, like="positions", scale=0.02)
    yield "", (ids, types, positions, words, kinds, places, *gamma_beta, 1e-12)
    yield "no types", (ids, None, positions, words, None, places, *gamma_beta, 1e-5)
    yield "int32", (ids.int(), types.int(), positions.int(), words, kinds, places, *gamma_beta, 1e-12)
    yield "small variance", (ids, types, positions, words / 20, kinds / 20, places / 20, *gamma_beta, 1e-12)
    seed = torch.tensor(SEED)
    yield "dropout, padding", (ids, types, positions, words, kinds, places, *gamma_beta, 1e-12, 0.1, seed, 3, 1)
    yield "saved", (ids, types, positions, words, kinds, places, *gamma_beta, 1e-12, 0.0, None, -1, -1, True)


def embed_layer_norm_stock(
    ids, types, positions, words, kinds, places, gamma, beta, eps, p=0.0, seed=None, *rest
) -> tuple[torch.Tensor, ...]:
    dropout = on(ids.device, philox.hidden(int(seed), 3, *ids.shape, words.shape[1], p)) if p else None
    arguments = ids, types, positions, words, kinds, places, gamma, beta, eps, dropout, *rest
    return stock.embed_layer_norm_and_statistics(*arguments)


# linear, linear_gelu, feed_forward


def linear_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    hidden = case.hidden
    x, weight = normal(case.tokens, hidden, like="x"), normal(3 * hidden, hidden, like="w", scale=hidden**-0.5)
    yield "", (x, weight, normal(3 * hidden, like="b", scale=0.1))
    yield "no bias", (x, weight, None)


def linear_gelu_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    hidden, wide = case.hidden, case.intermediate
    x, weight = normal(case.tokens, hidden, like="x"), normal(wide, hidden, like="w1", scale=hidden**-0.5)
    bias = normal(wide, like="b1", scale=0.1)
    yield "", (x, weight, bias, "none")
    yield "tanh", (x, weight, None, "tanh")
    yield "saved", (x, weight, bias, "none", True)


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit dtype; of float32, 128 of each binade and sign and many from -14 to 14.

    Of those with 8 exponent bits not the magnitudes from 2^126, where torch's own GELU overflows on its way, nor those
    below 2^-124, whose results oneDNN's and torch's products flush to zero.
    """
    if dtype != torch.float32:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
        values = values[values.isfinite()].double()
        fits = (values.abs() < 2.0**126) & (values.abs() >= 2.0**-124)
        return values[fits] if dtype == torch.bfloat16 else values
    mantissa = 1 + torch.rand(250, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    magnitude = (mantissa * 2.0 ** torch.arange(-124, 126, dtype=torch.float64)[:, None]).flatten()
    return torch.cat([magnitude, -magnitude, torch.linspace(-14, 14, 32768, dtype=torch.float64)])


def gelu_inputs(dtype: torch.dtype, approximate: str) -> Arguments:
    """Arguments of linear_gelu that make it GELU alone: an identity weight, whose products and sums are exact."""
    values = all_values(dtype)
    x = F.pad(values, (0, -len(values) % 8)).view(-1, 8)
    return x, torch.eye(8, dtype=torch.float64), None, approximate


def feed_forward_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    hidden, wide = case.hidden, case.intermediate
    x, w1 = normal(case.tokens, hidden, like="x"), normal(wide, hidden, like="w1", scale=hidden**-0.5)
    w2, b2 = normal(hidden, wide, like="w2", scale=wide**-0.5), normal(hidden, like="b2", scale=0.1)
    b1 = normal(wide, like="b1", scale=0.1)
    yield "", (x, w1, b1, w2, b2, "none")
    yield "tanh, no biases", (x, w1, None, w2, None, "tanh")
    yield "saved", (x, w1, b1, w2, b2, "none", True)


def bias_gelu_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, bias = normal(case.tokens, case.intermediate, like="x"), normal(case.intermediate, like="b1", scale=0.5)
    yield "", (x, bias, "none")
    yield "tanh", (x, bias, "tanh")
    yield "no bias, far tails", (x * 4, None, "none")


# encoder_forward


def encoder_forward_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    hidden, wide, none = case.hidden, case.intermediate, torch.empty(0, dtype=torch.float64)

    def product(n: int, k: int, name: str) -> list[torch.Tensor]:
        return [normal(n, k, like=f"w {name}", scale=k**-0.5), *[none] * 4, normal(n, like=f"b {name}", scale=0.1)]

    def layer(name: str) -> list[torch.Tensor]:
        attention = product(3 * hidden, hidden, f"qkv {name}") + product(hidden, hidden, f"out {name}")
        inner = product(wide, hidden, f"first {name}") + product(hidden, wide, f"second {name}")
        return [*attention, *gain_and_shift(hidden), *inner, *gain_and_shift(hidden)]

    x = normal(case.tokens, hidden, like="x")
    call = x, case.cu_seqlens(), max(case.lengths)
    yield "", (*call, layer("0"), case.heads, case.dim**-0.5, 1e-12, "none")
    yield "two layers, tanh", (*call, layer("0") + layer("1"), case.heads, case.dim**-0.5, 1e-5, "tanh")


def quantized_linear_inputs(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    hidden, wide = case.hidden, case.intermediate
    x, weight = normal(case.tokens, hidden, like="x"), normal(wide, hidden, like="w1", scale=hidden**-0.5)
    bias, scales = normal(wide, like="b1", scale=0.1), (weight.abs().amax(1) / 127).float()
    rounded = (weight / scales[:, None]).round().to(torch.int8)
    yield "", (x, rounded, scales, bias)
    yield "erf", (x, rounded, scales, bias, None, None, 1, "none")
    columns = torch.tensor([hidden - 1, 2])  # as they may come: in any order
    outliers, rounded = weight[:, columns].to(torch.bfloat16), rounded.index_fill(1, columns, 0)
    with_outliers = x.clone()
    with_outliers[:, columns] *= 1e3
    yield "columns of outliers", (with_outliers, rounded, scales, bias, columns, outliers)
    whole = torch.round(with_outliers * 64) / 64  # whose sums are exact in every order
    width = hidden & -hidden  # the greatest power of two that divides it
    yield "rotated", (whole.clamp(-2e3, 2e3), rounded, scales / width, bias, columns, outliers, width)
    x = x.clone()
    x[1::3] = 0
    x[2::3, 1] = 1e4  # an outlier that is in none of the columns
    yield "zeros, outliers, no bias, tanh", (x, rounded, scales, None, columns, outliers, 1, "tanh")


ATTENTION = Spec(ops.attention, attention_inputs, stock.attention_and_lse)
ADD_LAYER_NORM = Spec(ops.add_layer_norm, add_layer_norm_inputs, add_layer_norm_stock, rows=(0, 2))
EMBED_LAYER_NORM = Spec(ops.embed_layer_norm, embed_layer_norm_inputs, embed_layer_norm_stock, rows=())
LINEAR = Spec(ops.linear, linear_inputs, stock.linear, weights=(1,))
LINEAR_GELU = Spec(ops.linear_gelu, linear_gelu_inputs, stock.linear_gelu_and_pre, weights=(1,))
FEED_FORWARD = Spec(ops.feed_forward, feed_forward_inputs, stock.feed_forward_and_pre, weights=(1, 3))
BIAS_GELU = Spec(ops.bias_gelu, bias_gelu_inputs, stock.bias_gelu)
ENCODER_FORWARD = Spec(ops.encoder_forward, encoder_forward_inputs, stock.encoder_forward, weights=(3,))
QUANTIZED_LINEAR = Spec(ops.quantized_linear, quantized_linear_inputs, stock.quantized_linear, weights=(1, 5))
SPECS = (ATTENTION, ADD_LAYER_NORM, EMBED_LAYER_NORM, LINEAR, LINEAR_GELU, FEED_FORWARD, BIAS_GELU)
