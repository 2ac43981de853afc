"""linear_gelu: gelu(x·weightᵀ + bias), bias and GELU in the product's epilogue; tiles and products of linear."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import card_of, dtype_reasons
from .gelu import gelu, gelu_slope
from .linear import (
    SUMMED,
    WIDE,
    choose_tiles,
    halves,
    linear_backward,
    linear_reasons,
    multiplied,
    operands,
    place_of,
    programs_of,
    share_of_rows,
    store_rows,
    sum_of_parts,
    tile_of,
    with_bias,
)


@triton.jit
def store_gelu(
    pre, Y, PRE, row, columns, M, N, ROWS: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """gelu(pre) to Y and, if it is to be saved, pre to PRE; pre [ROWS, COLUMNS]."""
    if PRE is not None:
        store_rows(pre, PRE, row, columns, M, N, ROWS)
    store_rows(gelu(pre, APPROXIMATE, Y.dtype.element_ty), Y, row, columns, M, N, ROWS)


@triton.jit(do_not_specialize=["tokens"])
def linear_gelu_kernel(
    X, WEIGHT, BIAS, Y, PRE, tokens, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, BY_ROWS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = place_of(tile, tokens, N, BLOCK_M, BLOCK_N, BAND)
        pre = tile_of(
            X, WEIGHT, row, column, tokens, N, K, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, PRECISION, DESCRIBED, BY_ROWS
        )
        if BLOCK_N >= WIDE:
            left, right = halves(pre, BLOCK_M, BLOCK_N)
            columns = column + tl.arange(0, BLOCK_N // 2)
            store_gelu(with_bias(left, BIAS, columns, N), Y, PRE, row, columns, tokens, N, BLOCK_M, APPROXIMATE)
            columns += BLOCK_N // 2
            store_gelu(with_bias(right, BIAS, columns, N), Y, PRE, row, columns, tokens, N, BLOCK_M, APPROXIMATE)
        else:
            columns = column + tl.arange(0, BLOCK_N)
            store_gelu(with_bias(pre, BIAS, columns, N), Y, PRE, row, columns, tokens, N, BLOCK_M, APPROXIMATE)


@triton.jit(do_not_specialize=["tokens", "share"])
def gelu_backward_kernel(
    GRAD, PRE, BIAS, OUT, PARTS, tokens, share, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """GRAD·slope of PRE + BIAS → OUT [T, N], and its sums over a program's share of the tokens → PARTS [shares, N]."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(1) * share
    end = min(start + share, tokens)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(start, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        places = rows.to(tl.int64)[:, None] * N + columns[None, :]  # [ROWS, COLUMNS]
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        grad = tl.load(GRAD + places, mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(PRE + places, mask=mask, other=0.0).to(tl.float32)
        pre = with_bias(pre, BIAS, columns, N)
        dpre = grad * gelu_slope(pre, APPROXIMATE, OUT.dtype.element_ty)
        tl.store(OUT + places, dpre.to(OUT.dtype.element_ty), mask=mask)
        total += dpre
    place = tl.program_id(1).to(tl.int64) * N + columns
    tl.store(PARTS + place, tl.sum(total.to(tl.float64), 0).to(tl.float32), mask=columns < N)


def launch_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor | None, approximate: str
) -> None:
    """gelu(x·weightᵀ + bias) to y, and what it is taken of to pre."""
    (tokens, depth), columns, card = x.shape, weight.shape[0], card_of(x.device)
    tiles = choose_tiles(columns, depth, x.dtype, card)
    a, b, constants = operands(x, weight, False, tiles)
    bias = None if bias is None else bias.contiguous()
    linear_gelu_kernel[(programs_of(tokens, columns, tiles, card),)](
        a, b, bias, y, pre, tokens, columns, depth, **constants, APPROXIMATE=approximate
    )


def linear_gelu_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> list[str]:
    return linear_reasons(x, weight, bias)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none", save: bool = False
) -> tuple[Tensor, Tensor]:
    """x [T, K] → gelu(x·weightᵀ + bias) [T, N], and x·weightᵀ + bias if it is to be saved, else an empty tensor."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    pre = torch.empty_like(y) if save else x.new_empty(0)
    if y.numel():
        launch_linear_gelu(x, weight, bias, y, pre if save else None, approximate)
    return y, pre


def linear_gelu_backward_reasons(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> list[str]:
    return linear_reasons(x, weight, bias) + dtype_reasons(grad=grad, pre=pre)


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor, approximate: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    """grad [T, N] → the gradients of x, weight, bias; an empty `pre` is computed again."""
    pre = pre if pre.dim() == 2 else multiplied(x, weight, bias)
    dpre, dbias = gelu_backward(grad, pre, approximate)
    dx, dweight, _ = linear_backward(dpre, x, weight, [*needed[:2], False])
    return dx, dweight, dbias if needed[2] else x.new_empty(0)


def gelu_backward(grad: Tensor, pre: Tensor, approximate: str, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """grad·slope of pre + bias [T, N] and its sums over T [N], in pre's dtype."""
    (tokens, columns), card = pre.shape, card_of(pre.device)
    dpre = pre.new_empty(tokens, columns)
    if not dpre.numel():
        return dpre, pre.new_zeros(columns)
    across = triton.cdiv(columns, SUMMED[1])
    bias = None if bias is None else bias.contiguous()
    share = share_of_rows(tokens, across, SUMMED[0], card)
    parts = pre.new_empty(triton.cdiv(tokens, share), columns, dtype=torch.float32)
    gelu_backward_kernel[across, parts.shape[0]](
        grad.contiguous(), pre.contiguous(), bias, dpre, parts, tokens, share, columns, ROWS=SUMMED[0],
        COLUMNS=SUMMED[1], APPROXIMATE=approximate,
    )  # fmt: skip
    return dpre, sum_of_parts(parts, pre.new_empty(columns))
