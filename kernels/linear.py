"""linear: x·weightᵀ + bias, and the products of its backward, which linear_gelu and feed_forward share.

Tiles depend on the sizes of the weight, the dtype and the card, never on the tokens, and no sum is split between
programs: a row's result does not depend on the rows beside it. From sm_90 on 16-bit operands are read by tensor
descriptors (TMA) and programs are as many as the card holds at a time; below, and where rows are not aligned, by
pointers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .cards import Card, card_of, device_reasons, dtype_reasons, precision_of

DESCRIBED_FROM = 90  # sm_90 has TMA
ALIGNMENT = 16  # bytes, of the rows that TMA and wide loads read
ALIGNED = 8  # elements of 16 bits
SPLIT_ROWS = 512  # the fewest tokens of a partial sum of a weight's gradient
SUMMED = (32, 64)  # rows and columns that column_sums_kernel adds up at a time
PACKED = "the weight is packed for a CPU"
WIDE = tl.constexpr(128)  # columns from which a tile is stored in two halves


@dataclass(frozen=True)
class Tiles:
    """A product's tile is rows x columns; depth is summed at a time.

    chunk: what is summed one after the other before it is added to the total, 0: all. band: rows of tiles that follow
    one another. described: whether operands are read by tensor descriptors. blocks: that a multiprocessor holds.
    registers: the most of a thread, None: as many as it has use for.
    """

    rows: int
    columns: int
    depth: int
    chunk: int
    band: int
    described: bool
    blocks: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    def constants(self) -> dict[str, Any]:
        """What a kernel's launch takes of them."""
        return {
            "BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth, "CHUNK": self.chunk,
            "BAND": self.band, "DESCRIBED": self.described, "num_warps": self.num_warps, "num_stages": self.num_stages,
            "maxnreg": self.registers,
        }  # fmt: skip


def choose_tiles(columns: int, depth: int, dtype: torch.dtype, card: Card, by_rows: bool = False) -> Tiles:
    """Of a product [any, depth] · [columns, depth]ᵀ, or by_rows of [any, depth] · [depth, columns]."""
    width, deep = (min(most, max(16, triton.next_power_of_2(n))) for most, n in ((128, columns), (64, depth)))
    if dtype == torch.float32:
        return Tiles(64, min(width, 64), min(deep, 32), 256, 8, False, 3 if card.arch in (90, 100) else 2, 4, 2)
    if depth % ALIGNED or (by_rows and columns % ALIGNED):  # loaded element by element
        return Tiles(64, min(width, 64), min(deep, 32), 0, 8, False, 2, 4, 3)
    described, even = card.arch >= DESCRIBED_FROM, columns % ALIGNED == 0  # else stored element by element
    if described and card.shared_memory >= 2**17:
        return Tiles(128, width, deep, 0, 8, True, 2 if even else 1, 8, 3, registers=128 if even else None)
    return Tiles(128, width if even else min(width, 64), min(deep, 32), 0, 8, described, 2, 4, 4)


@triton.jit
def place_of(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """The first row and column of a tile: column by column inside bands of BAND rows of tiles, which L2 holds."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tile // (BAND * across) * BAND
    height, inside = min(down - first, BAND), tile % (BAND * across)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def added(
    total, A, B, row, column, M, N, K, start, end, a_row, a_depth, b_column, b_depth, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + A[rows, start:end] · B[start:end, columns], by pointers."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)  # [BLOCK_M], [BLOCK_N]
    steps = tl.arange(0, BLOCK_K)
    a_places = A + rows.to(tl.int64)[:, None] * a_row + (start + steps).to(tl.int64)[None, :] * a_depth
    b_places = B + (start + steps).to(tl.int64)[:, None] * b_depth + columns.to(tl.int64)[None, :] * b_column
    for depth in range(start, end, BLOCK_K):
        inside = steps < K - depth
        a = tl.load(a_places, mask=(rows < M)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_places, mask=inside[:, None] & (columns < N)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_places += BLOCK_K * a_depth
        b_places += BLOCK_K * b_depth
    return total


@triton.jit
def product(
    A, B, row, column, M, N, K, start, end, a_row, a_depth, b_column, b_depth, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[rows, start:end] · B[start:end, columns] [BLOCK_M, BLOCK_N] in fp32, of A [M, K] and B [K, N]."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if CHUNK == 0:
        total = added(
            total, A, B, row, column, M, N, K, start, end, a_row, a_depth, b_column, b_depth, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION,
        )  # fmt: skip
    else:
        for chunk in range(start, end, CHUNK):
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total += added(
                part, A, B, row, column, M, N, K, chunk, min(chunk + CHUNK, end), a_row, a_depth, b_column, b_depth,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
    return total


@triton.jit
def described_product(
    A, B, row, column, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BY_ROWS: tl.constexpr
):  # fmt: skip
    """A[rows] · B [BLOCK_M, BLOCK_N] in fp32, of descriptors of A [M, K] and B [N, K]; BY_ROWS: of B [K, N]."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for depth in range(0, K, BLOCK_K):
        a = A.load([row, depth])  # [BLOCK_M, BLOCK_K]
        b = B.load([depth, column]) if BY_ROWS else B.load([column, depth]).T  # [BLOCK_K, BLOCK_N]
        total = tl.dot(a, b, total)
    return total


@triton.jit
def tile_of(
    A, B, row, column, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    """A [M, K] · Bᵀ of B [N, K], or BY_ROWS A · B of B [K, N]; A and B contiguous or DESCRIBED → [BLOCK_M, BLOCK_N]."""
    if DESCRIBED:
        out = described_product(A, B, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K, BY_ROWS)
    elif BY_ROWS:
        out = product(A, B, row, column, M, N, K, 0, K, K, 1, 1, N, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, PRECISION)
    else:
        out = product(A, B, row, column, M, N, K, 0, K, K, 1, K, 1, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, PRECISION)
    return out


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of x [ROWS, COLUMNS], which are stored one after the other: fewer registers."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def with_bias(x, BIAS, columns, N):
    """x [·, COLUMNS] + bias [N] at these columns."""
    if BIAS is not None:
        x += tl.load(BIAS + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def places_of(row, columns, M, N, ROWS: tl.constexpr):
    """Of ROWS rows of a matrix [M, N] from `row` on: where the first starts, then places from there, which are inside.

    Inside a tile places fit 32 bits, N being under 2^24: half the registers of 64.
    """
    rows = tl.arange(0, ROWS)
    return (
        row.to(tl.int64) * N,
        rows[:, None] * N + columns[None, :],
        (rows < M - row)[:, None] & (columns < N)[None, :],
    )


@triton.jit
def store_rows(x, OUT, row, columns, M, N, ROWS: tl.constexpr):
    """x [ROWS, COLUMNS] in fp32 to OUT [M, N], rounded."""
    start, places, mask = places_of(row, columns, M, N, ROWS)
    tl.store(OUT + start + places, x.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    X, WEIGHT, BIAS, Y, tokens, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = place_of(tile, tokens, N, BLOCK_M, BLOCK_N, BAND)
        y = tile_of(
            X, WEIGHT, row, column, tokens, N, K, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, PRECISION, DESCRIBED, BY_ROWS
        )
        if BLOCK_N >= WIDE:
            left, right = halves(y, BLOCK_M, BLOCK_N)
            columns = column + tl.arange(0, BLOCK_N // 2)
            store_rows(with_bias(left, BIAS, columns, N), Y, row, columns, tokens, N, BLOCK_M)
            columns += BLOCK_N // 2
            store_rows(with_bias(right, BIAS, columns, N), Y, row, columns, tokens, N, BLOCK_M)
        else:
            columns = column + tl.arange(0, BLOCK_N)
            store_rows(with_bias(y, BIAS, columns, N), Y, row, columns, tokens, N, BLOCK_M)


@triton.jit(do_not_specialize=["tokens", "share"])
def weight_grad_kernel(
    GRAD, X, OUT, tokens, share, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """GRADᵀ [N, T] · X [T, K], of the program's share of the tokens → OUT [shares, N, K]."""
    row, column = place_of(tl.program_id(0), N, K, BLOCK_M, BLOCK_N, BAND)
    start = tl.program_id(1) * share
    end = min(start + share, tokens)
    if DESCRIBED:
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for token in range(start, end, BLOCK_K):
            out = tl.dot(GRAD.load([token, row]).T, X.load([token, column]), out)
    else:
        out = product(
            GRAD, X, row, column, N, K, end, start, end, 1, N, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, PRECISION
        )
    OUT += tl.program_id(1).to(tl.int64) * N * K
    if BLOCK_N >= WIDE:
        left, right = halves(out, BLOCK_M, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_N // 2)
        store_rows(left, OUT, row, columns, N, K, BLOCK_M)
        store_rows(right, OUT, row, columns + BLOCK_N // 2, N, K, BLOCK_M)
    else:
        store_rows(out, OUT, row, column + tl.arange(0, BLOCK_N), N, K, BLOCK_M)


@triton.jit(do_not_specialize=["rows", "share"])
def column_sums_kernel(X, OUT, rows, share, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the program's share of the rows of X [rows, N] → OUT [shares, N]; one share: the sums."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(1) * share
    end = min(start + share, rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(start, end, ROWS):
        inside = row + tl.arange(0, ROWS)
        mask = (inside < end)[:, None] & (columns < N)[None, :]
        total += tl.load(X + inside.to(tl.int64)[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    place = tl.program_id(1).to(tl.int64) * N + columns
    tl.store(OUT + place, tl.sum(total.to(tl.float64), 0).to(tl.float32).to(OUT.dtype.element_ty), mask=columns < N)


def readable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that is contiguous and stands where wide loads can read it."""
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % ALIGNMENT else matrix


def operand(matrix: Tensor, rows: int, columns: int, tiles: Tiles) -> Any:
    """What a kernel is handed of a matrix, of which it reads blocks of this size."""
    matrix = readable(matrix)
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if tiles.described else matrix


def operands(a: Tensor, b: Tensor, by_rows: bool, tiles: Tiles) -> tuple[Any, Any, dict[str, Any]]:
    """The operands of a·bᵀ, or by_rows of a·b, as kernels take them, and the constants of the launch."""
    block = (tiles.depth, tiles.columns) if by_rows else (tiles.columns, tiles.depth)
    constants = {**tiles.constants(), "PRECISION": precision_of(a.dtype), "BY_ROWS": by_rows}
    return operand(a, tiles.rows, tiles.depth, tiles), operand(b, *block, tiles), constants


def programs_of(tokens: int, columns: int, tiles: Tiles, card: Card) -> int:
    """As many as there are tiles; from sm_90 on at most as many as the card holds at a time."""
    count = triton.cdiv(tokens, tiles.rows) * triton.cdiv(columns, tiles.columns)
    return min(count, card.multiprocessors * tiles.blocks) if card.arch >= DESCRIBED_FROM else count


def multiplied(a: Tensor, b: Tensor, bias: Tensor | None, by_rows: bool = False) -> Tensor:
    """a [T, K] · bᵀ of b [N, K], by_rows a · b of b [K, N], + bias [N] → [T, N]."""
    (tokens, depth), columns = a.shape, b.shape[1 if by_rows else 0]
    y = a.new_empty(tokens, columns)
    if not y.numel():
        return y
    card = card_of(a.device)
    tiles = choose_tiles(columns, depth, a.dtype, card, by_rows)
    a, b, constants = operands(a, b, by_rows, tiles)
    bias = None if bias is None else bias.contiguous()
    linear_kernel[(programs_of(tokens, columns, tiles, card),)](a, b, bias, y, tokens, columns, depth, **constants)
    return y


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ·x [N, K] of grad [T, N] and x [T, K]. Where tiles do not fill the card, sums over shares of the tokens."""
    (tokens, rows), columns = grad.shape, x.shape[1]
    out = grad.new_empty(rows, columns) if tokens else grad.new_zeros(rows, columns)
    if not tokens or not out.numel():
        return out
    card = card_of(grad.device)
    tiles = choose_tiles(columns, 64 + rows, grad.dtype, card, by_rows=True)  # deep, and aligned as the rows are
    count = triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)
    shares = max(1, min(card.multiprocessors * tiles.blocks // count, tokens // SPLIT_ROWS))
    share = triton.cdiv(triton.cdiv(tokens, shares), tiles.depth) * tiles.depth
    shares = triton.cdiv(tokens, share)
    parts = out if shares == 1 else grad.new_empty(shares, rows, columns, dtype=torch.float32)
    weight_grad_kernel[count, shares](
        operand(grad, tiles.depth, tiles.rows, tiles), operand(x, tiles.depth, tiles.columns, tiles), parts, tokens,
        share, rows, columns, **tiles.constants(), PRECISION=precision_of(grad.dtype),
    )  # fmt: skip
    return out if shares == 1 else sum_of_parts(parts, out)


def sum_of_parts(parts: Tensor, out: Tensor) -> Tensor:
    """parts [P, ...] in fp32, added up into out [...]."""
    count, size = parts.shape[0], out.numel()
    rows, columns = (1, 1024) if size >= 2**16 else (32, 32)
    column_sums_kernel[triton.cdiv(size, columns), 1](parts, out, count, count, size, ROWS=rows, COLUMNS=columns)
    return out


def share_of_rows(tokens: int, across: int, rows: int, card: Card) -> int:
    """How many rows, a multiple of `rows`, a program sums where `across` programs stand side by side."""
    down = max(1, 8 * card.multiprocessors // across)
    return triton.cdiv(triton.cdiv(tokens, down), rows) * rows


def sum_of_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, N] → its sums over T in x's dtype or another one, from partial sums in fp32."""
    tokens, columns = x.shape
    out = x.new_empty(columns, dtype=dtype) if tokens else x.new_zeros(columns, dtype=dtype)
    if not tokens or not columns:
        return out
    share = share_of_rows(tokens, triton.cdiv(columns, SUMMED[1]), SUMMED[0], card_of(x.device))
    parts = x.new_empty(triton.cdiv(tokens, share), columns, dtype=torch.float32)
    column_sums_kernel[triton.cdiv(columns, SUMMED[1]), parts.shape[0]](
        x.contiguous(), parts, tokens, share, columns, ROWS=SUMMED[0], COLUMNS=SUMMED[1]
    )
    return sum_of_parts(parts, out)


def linear_reasons(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    if not isinstance(weight, Tensor):
        return [PACKED]
    return device_reasons(x.device) + dtype_reasons(x=x, weight=weight, bias=bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] → x·weightᵀ + bias [T, N]."""
    return multiplied(x, weight, bias)


def linear_backward_reasons(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> list[str]:
    return linear_reasons(x, weight) + dtype_reasons(grad=grad)


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    """grad [T, N] → the gradients of x, weight, bias."""
    return (
        multiplied(grad, weight, None, by_rows=True) if needed[0] else x.new_empty(0),
        weight_grad(grad, x) if needed[1] else x.new_empty(0),
        sum_of_rows(grad) if needed[2] else x.new_empty(0),
    )
