"""feed_forward: linear(linear_gelu(x)); GELU's gradient and db1 in the epilogue of the second product's backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import card_of
from .gelu import gelu, gelu_slope
from .linear import (
    WIDE,
    choose_tiles,
    halves,
    linear,
    linear_reasons,
    multiplied,
    operands,
    place_of,
    places_of,
    programs_of,
    store_rows,
    sum_of_parts,
    sum_of_rows,
    tile_of,
    weight_grad,
)
from .linear_gelu import linear_gelu, linear_gelu_backward_reasons

ELEMENTS = 1024  # of a program of gelu_kernel


@triton.jit
def store_inner_grad(
    dinner, PRE, DPRE, INNER, PARTS, row, columns, M, N, ROWS: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """dinner·slope of PRE to DPRE, its sums over the rows to PARTS and, if wanted, gelu(PRE) to INNER."""
    start, places, mask = places_of(row, columns, M, N, ROWS)
    pre = tl.load(PRE + start + places, mask=mask, other=0.0).to(tl.float32)
    dpre = dinner * gelu_slope(pre, APPROXIMATE, DPRE.dtype.element_ty)  # 0 in rows from M on
    store_rows(dpre, DPRE, row, columns, M, N, ROWS)
    tl.store(PARTS + (row // ROWS).to(tl.int64) * N + columns, tl.sum(dpre, 0), mask=columns < N)
    if INNER is not None:
        store_rows(gelu(pre, APPROXIMATE, INNER.dtype.element_ty), INNER, row, columns, M, N, ROWS)


@triton.jit
def store_inner_grads(
    dinner, PRE, DPRE, INNER, PARTS, row, column, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """store_inner_grad of both halves of dinner [ROWS, COLUMNS]."""
    left, right = halves(dinner, ROWS, COLUMNS)
    columns = column + tl.arange(0, COLUMNS // 2)
    store_inner_grad(left, PRE, DPRE, INNER, PARTS, row, columns, M, N, ROWS, APPROXIMATE)
    columns += COLUMNS // 2
    store_inner_grad(right, PRE, DPRE, INNER, PARTS, row, columns, M, N, ROWS, APPROXIMATE)


@triton.jit(do_not_specialize=["tokens"])
def inner_grad_kernel(
    GRAD, WEIGHT, PRE, DPRE, INNER, PARTS, tokens, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    BY_ROWS: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """GRAD [T, K] · WEIGHT [K, N] · slope of PRE [T, N]."""
    tiles = tl.cdiv(tokens, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = place_of(tile, tokens, N, BLOCK_M, BLOCK_N, BAND)
        dinner = tile_of(
            GRAD, WEIGHT, row, column, tokens, N, K, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, PRECISION, DESCRIBED, BY_ROWS
        )
        if BLOCK_N >= WIDE:
            half: tl.constexpr = BLOCK_N // 2
            left, right = halves(dinner, BLOCK_M, BLOCK_N)
            store_inner_grads(left, PRE, DPRE, INNER, PARTS, row, column, tokens, N, BLOCK_M, half, APPROXIMATE)
            column += half
            store_inner_grads(right, PRE, DPRE, INNER, PARTS, row, column, tokens, N, BLOCK_M, half, APPROXIMATE)
        else:
            store_inner_grads(dinner, PRE, DPRE, INNER, PARTS, row, column, tokens, N, BLOCK_M, BLOCK_N, APPROXIMATE)


@triton.jit(do_not_specialize=["size"])
def gelu_kernel(X, OUT, size, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + places, mask=places < size, other=0.0).to(tl.float32)
    y = gelu(x, APPROXIMATE, OUT.dtype.element_ty)
    tl.store(OUT + places, y.to(OUT.dtype.element_ty), mask=places < size)


def feed_forward_reasons(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> list[str]:  # fmt: skip
    return linear_reasons(x, w1, b1) or linear_reasons(x, w2, b2)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "none",
    save: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [T, H], w1 [I, H], w2 [H, I] → gelu(x·w1ᵀ + b1)·w2ᵀ + b2 [T, H], and x·w1ᵀ + b1 [T, I] as in `linear_gelu`."""
    inner, pre = linear_gelu(x, w1, b1, approximate, save)
    return linear(inner, w2, b2), pre


def feed_forward_backward_reasons(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> list[str]:  # fmt: skip
    return linear_gelu_backward_reasons(grad, x, w1, b1, pre, approximate, needed) or linear_reasons(x, w2)


def feed_forward_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, pre: Tensor, approximate: str,
    needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad [T, H] → the gradients of x, w1, b1, w2, b2; an empty `pre` is computed again."""
    dx, dw1, db1, inner, dw2, db2 = (x.new_empty(0) for _ in range(6))
    if any(needed[:4]):
        pre = pre.contiguous() if pre.dim() == 2 else multiplied(x, w1, b1)
    if any(needed[:3]):
        dpre, inner, db1 = inner_grad(grad, w2, pre, approximate, needed[3])
        dx = multiplied(dpre, w1, None, by_rows=True) if needed[0] else dx
        dw1 = weight_grad(dpre, x) if needed[1] else dw1
    elif needed[3]:
        inner = gelu_of(pre, approximate)
    return (
        dx,
        dw1,
        db1 if needed[2] else x.new_empty(0),
        weight_grad(grad, inner) if needed[3] else dw2,
        sum_of_rows(grad) if needed[4] else db2,
    )


def inner_grad(
    grad: Tensor, w2: Tensor, pre: Tensor, approximate: str, with_inner: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad·w2·slope of pre [T, I], gelu(pre) [T, I] if it is wanted, and the first's sums over T [I]."""
    tokens, columns = pre.shape
    dpre, inner = torch.empty_like(pre), torch.empty_like(pre) if with_inner else pre.new_empty(0)
    if not dpre.numel():
        return dpre, inner, pre.new_zeros(columns)
    card = card_of(pre.device)
    tiles = choose_tiles(columns, grad.shape[1], grad.dtype, card, by_rows=True)
    a, b, constants = operands(grad, w2, True, tiles)
    parts = pre.new_empty(triton.cdiv(tokens, tiles.rows), columns, dtype=torch.float32)
    inner_grad_kernel[(programs_of(tokens, columns, tiles, card),)](
        a, b, pre, dpre, inner if with_inner else None, parts, tokens, columns, grad.shape[1], **constants,
        APPROXIMATE=approximate,
    )  # fmt: skip
    return dpre, inner, sum_of_parts(parts, pre.new_empty(columns))


def gelu_of(pre: Tensor, approximate: str) -> Tensor:
    """gelu(pre) [T, I], for the gradient of w2 alone."""
    out = torch.empty_like(pre)
    if out.numel():
        gelu_kernel[(triton.cdiv(out.numel(), ELEMENTS),)](pre, out, out.numel(), approximate, ELEMENTS)
    return out
