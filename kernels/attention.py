"""attention: softmax attention inside each sequence of a packed batch, forward and backward (docs/kernels.md).

Online softmax and its gradient: Dao et al. 2022, "FlashAttention", algorithms 1 and 4; Dao 2023, "FlashAttention-2".
Sequences are launched by classes of lengths. T tokens, B sequences, N heads, D head dim, W words of keep bits a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import SPILLING, Card, card_of, device_reasons, dtype_reasons, precision_of
from .linear import sum_of_rows

CLASSES = (64, 128, 256, 512)  # the longest sequence of each length class; a last class holds longer ones
LARGEST_DIM = 128
LOG2E = tl.constexpr(1.4426950408889634)
# Of fp32 products without tensor cores Triton before 3.9 keeps a left operand that stays in a loop in registers, which
# spill with wide heads; from 3.9 on a right one
TURNS = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))
# Why these kernels hold HMMA on sm_90
EXCEPTIONS = {
    "dkdv_kernel BLOCK_M=32 PADDED=128": "with 64 queries dk and dv of wide heads spill; HGMMA takes no 32 rows",
    "dq_kernel PRECISION=tf32": "tiles of fp32 have 32 rows; HGMMA takes 64",
    "dkdv_kernel PRECISION=tf32": "tiles of fp32 have 32 rows; HGMMA takes 64",
    "forward_kernel PRECISION=tf32 PADDED=128": "tiles of fp32 have 32 rows; HGMMA takes 64",
}


@dataclass(frozen=True)
class Tiles:
    """block_m queries by block_n keys; ctas: at least so many fit a multiprocessor; registers: a thread's most.

    whole: one tile holds all keys of a sequence.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ctas: int = 1
    registers: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class BackwardTiles:
    """One kernel for all gradients, whose block_m holds all queries of a sequence; or one for dq and one for dk, dv."""

    one_pass: Tiles | None = None
    dq: Tiles | None = None
    dkdv: Tiles | None = None


def padded_dim(dim: int) -> int:
    """The power of two, at least 16, that a head is padded to by masks."""
    return max(16, triton.next_power_of_2(dim))


def choose_tiles(longest: int, dim: int, dtype: torch.dtype, card: Card, precision: str = "ieee") -> Tiles:
    """The forward's tiles for sequences of at most `longest` tokens; the same however many there are.

    From what ptxas made of them for sm_80 to sm_120 with Triton 3.6 and 3.9 (no spill in a loop); none was timed.
    """
    padded = padded_dim(dim)
    if dtype == torch.float32 and precision == "tf32" and padded <= 64:
        return Tiles(64, 32, 4, 1)
    if dtype == torch.float32:  # without tensor cores: few elements a thread, whose operands all stand in registers
        side = 64 if padded <= 64 else 32
        return Tiles(side, side, 16, 1, registers=128, whole=longest <= 64 == side)
    if longest <= 128:
        return Tiles(64, 64 if longest <= 64 else 128, 4, 1, ctas=2, whole=True)
    if padded > 64:
        return Tiles(128, 64, 8, 2)
    narrow = padded == 64 and (card.arch >= 120 or card.arch in SPILLING)  # which spill with 128 queries
    return Tiles(64 if narrow else 128, 64, 4, 2, ctas=2)


def choose_backward_tiles(
    longest: int, dim: int, dtype: torch.dtype, card: Card, precision: str = "ieee"
) -> BackwardTiles:
    """The backward's tiles for sequences of at most `longest` tokens, chosen as those of the forward."""
    padded = padded_dim(dim)
    if dtype == torch.float32:
        if longest <= 64 and padded <= 64 and precision == "ieee" and card.arch not in SPILLING:
            return BackwardTiles(Tiles(64, 64, 16, 1, registers=128))
        return BackwardTiles(
            dq=Tiles(32, 32, 8 if padded <= 64 else 16, 1),
            dkdv=Tiles(32, 32, 16 if precision == "tf32" and padded > 64 else 8, 1),
        )
    if padded > 64:
        return BackwardTiles(dq=Tiles(64, 64, 8 if card.arch >= 120 else 4, 2), dkdv=Tiles(32, 64, 8, 2))
    if longest <= 64:
        return BackwardTiles(Tiles(64, 64, 4, 1, ctas=2))
    if longest <= 128:
        return BackwardTiles(Tiles(128, 64, 8, 1))
    return BackwardTiles(dq=Tiles(64, 64, 4, 2, ctas=2), dkdv=Tiles(64, 32 if card.arch >= 120 else 64, 4, 2, ctas=2))


@triton.jit
def sequence_at(ORDER, CU, place):
    """The first token (int64) and the length of the sequence at a place of the order."""
    sequence = place
    if ORDER is not None:
        sequence = tl.load(ORDER + place)
    start = tl.load(CU + sequence)
    return start.to(tl.int64), tl.load(CU + sequence + 1) - start


@triton.jit
def load_tile(base, stride, left, ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a head [ROWS, PADDED] from `base` on; 0 past the `left` rows that there are, and past D."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    return tl.load(base + rows * stride + dims, mask=(rows < left) & (dims < D), other=0.0)


@triton.jit
def store_tile(base, stride, left, tile, ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    tl.store(base + rows * stride + dims, tile.to(base.dtype.element_ty), mask=(rows < left) & (dims < D))


@triton.jit
def is_key(keys, left):
    """Which columns of a tile are keys of the sequence; so written, a thread keeps two numbers, not every column."""
    return keys % 8 < left - keys // 8 * 8


@triton.jit
def weights_of(scores, most, scale, EXACT: tl.constexpr):
    """exp((scores - most) · scale). EXACT, for fp32 inputs: no rounded product is subtracted."""
    if EXACT:
        return tl.exp2((scores - most) * (scale * LOG2E))
    return tl.exp2(tl.fma(scores, scale * LOG2E, -most * (scale * LOG2E)))


@triton.jit
def probabilities_of(scores, lse, scale, EXACT: tl.constexpr):
    """exp(scores · scale - lse). EXACT, for fp32 inputs: no rounded lse is multiplied."""
    if EXACT:
        return tl.exp2((scores * scale - lse) * LOG2E)
    return tl.exp2(tl.fma(scores, scale * LOG2E, -lse * LOG2E))


@triton.jit
def kept(bits, width, rows, rows_left, keys, keys_left, WORDS: tl.constexpr):
    """Which probabilities of a tile are kept; rows [M], keys [1, N]; bits: at the tile's first word."""
    words = tl.load(bits + rows * width, mask=rows < rows_left, other=0)[:, None]
    for i in tl.static_range(1, WORDS):
        there = rows < tl.where(32 * i < keys_left, rows_left, 0)
        more = tl.load(bits + rows * width + i, mask=there, other=0)[:, None]
        words = tl.where(keys // 32 == i, more, words)
    return ((words >> (keys % 8)) & (1 << (keys % 32 // 8 * 8))) != 0  # the second factor is known when it is compiled


@triton.jit
def product(stays, moves, PRECISION: tl.constexpr):
    """stays [M, D] · moves [N, D]ᵀ, in a loop over `moves`."""
    if TURNS and stays.dtype == tl.float32:
        return tl.dot(moves, stays.T, input_precision=PRECISION).T
    return tl.dot(stays, moves.T, input_precision=PRECISION)


@triton.jit
def delta_of(out, dout):
    """Rows of out · dout, or of P · dP, which is the same: what the softmax's gradient subtracts."""
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)


@triton.jit
def store_sum(PARTS, place, heads, head, tile, D: tl.constexpr, PADDED: tl.constexpr):
    """The sum over the rows of a tile → PARTS [2 P, N, D] at a place: a program's share of dq's sum, then of dv's.

    Where nothing is dropped that of dv is the sum of dout: a row of P sums up to 1.
    """
    dims = tl.arange(0, PADDED)
    tl.store(PARTS + (heads.to(tl.int64) * place + head) * D + dims, tl.sum(tile.to(tl.float32), 0), mask=dims < D)


VARYING = ["first", "blocks", "heads", "tokens", "width"]


@triton.jit(do_not_specialize=VARYING)
def whole_forward_kernel(
    QKV, OUT, LSE, CU, ORDER, BITS, first, blocks, heads, tokens, width, scale, keep_scale,
    D: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sequences of at most BLOCK_N tokens: the softmax of a row in one piece."""
    pair = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK_M
    head = pair % heads
    start, length = sequence_at(ORDER, CU, first + pair // heads)
    if i >= length:
        return
    stride, part = 3 * heads * D, heads * D
    far = stride.to(tl.int64)  # between tokens, where it multiplies more than a tile's rows
    keys_at = QKV + start * far + part + head * D
    query = load_tile(keys_at - part + i * far, stride, length - i, BLOCK_M, D, PADDED)
    key = load_tile(keys_at, stride, length, BLOCK_N, D, PADDED)
    value = load_tile(keys_at + part, stride, length, BLOCK_N, D, PADDED)
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    scores = tl.dot(query, key.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    scores = tl.where(is_key(keys, length), scores, float("-inf"))
    most = tl.max(scores, 1)
    probabilities = weights_of(scores, most[:, None], scale, query.dtype == tl.float32)
    total = tl.sum(probabilities, 1)
    row = head.to(tl.int64) * tokens + start + i
    if DROPOUT:
        keep = kept(BITS + row * width, width, rows, length - i, keys, length, BLOCK_N // 32)
        probabilities = tl.where(keep, probabilities, 0.0)
    out = tl.dot(probabilities.to(value.dtype), value, input_precision=PRECISION)
    out = out * (keep_scale / total)[:, None]
    store_tile(OUT + (start + i) * part + head * D, part, length - i, out, BLOCK_M, D, PADDED)
    tl.store(LSE + row + rows, most * scale + tl.log(total), mask=rows < length - i)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    QKV, OUT, LSE, CU, ORDER, BITS, first, blocks, heads, tokens, width, scale, keep_scale,
    D: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sequences of any length: online softmax over tiles of keys."""
    pair = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK_M
    head = pair % heads
    start, length = sequence_at(ORDER, CU, first + pair // heads)
    if i >= length:
        return
    stride, part = 3 * heads * D, heads * D
    far = stride.to(tl.int64)  # between tokens, where it multiplies more than a tile's rows
    keys_at = QKV + start * far + part + head * D
    query = load_tile(keys_at - part + i * far, stride, length - i, BLOCK_M, D, PADDED)
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    row = head.to(tl.int64) * tokens + start + i
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)  # before scores are scaled
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for j in range(0, length, BLOCK_N):
        key_at = keys_at + j * far
        key = load_tile(key_at, stride, length - j, BLOCK_N, D, PADDED)
        value = load_tile(key_at + part, stride, length - j, BLOCK_N, D, PADDED)
        scores = tl.dot(query, key.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = tl.where(is_key(keys, length - j), scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        probabilities = weights_of(scores, larger[:, None], scale, query.dtype == tl.float32)
        shrink = tl.exp2((most - larger) * (scale * LOG2E))
        total = total * shrink + tl.sum(probabilities, 1)
        if DROPOUT:
            bits = BITS + row * width + j // 32
            keep = kept(bits, width, rows, length - i, keys, length - j, BLOCK_N // 32)
            probabilities = tl.where(keep, probabilities, 0.0)
        out = tl.dot(probabilities.to(value.dtype), value, out * shrink[:, None], input_precision=PRECISION)
        most = larger
    out = out * (keep_scale / total)[:, None]
    store_tile(OUT + (start + i) * part + head * D, part, length - i, out, BLOCK_M, D, PADDED)
    tl.store(LSE + row + rows, most * scale + tl.log(total), mask=rows < length - i)


@triton.jit(do_not_specialize=["first", "heads", "tokens", "width"])
def one_pass_kernel(
    GRAD, QKV, OUT, LSE, DQKV, PARTS, CU, ORDER, BITS, first, heads, tokens, width, scale, keep_scale,
    D: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sequences of at most BLOCK_M tokens: all queries stay, dq grows in registers over tiles of keys.

    Where one tile holds all keys too, delta comes from it: without the rounding of out, and out is not read.
    """
    pair = tl.program_id(0)
    head = pair % heads
    start, length = sequence_at(ORDER, CU, first + pair // heads)
    if length == 0:
        return
    stride, part = 3 * heads * D, heads * D
    far = stride.to(tl.int64)  # between tokens, where it multiplies more than a tile's rows
    place = start * far + head * D
    queries_at, dqueries_at = QKV + place, DQKV + place
    row, out_at = head.to(tl.int64) * tokens + start, start * part + head * D
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    query = load_tile(queries_at, stride, length, BLOCK_M, D, PADDED)
    dout = load_tile(GRAD + out_at, part, length, BLOCK_M, D, PADDED)
    if PARTS is not None:
        store_sum(PARTS, pair // heads * 2 + 1, heads, head, dout, D, PADDED)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if BLOCK_N < BLOCK_M:
        delta = delta_of(load_tile(OUT + out_at, part, length, BLOCK_M, D, PADDED), dout)
    lse = tl.load(LSE + row + rows, mask=rows < length, other=0.0)[:, None]
    dquery = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for j in range(0, length, BLOCK_N):
        key_at = part + j * far
        key = load_tile(queries_at + key_at, stride, length - j, BLOCK_N, D, PADDED)
        value = load_tile(queries_at + key_at + part, stride, length - j, BLOCK_N, D, PADDED)
        scores = tl.dot(query, key.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        probabilities = probabilities_of(scores, lse, scale, query.dtype == tl.float32)
        probabilities = tl.where(is_key(keys, length - j), probabilities, 0.0)
        if BLOCK_N >= BLOCK_M and query.dtype == tl.float32:
            probabilities = probabilities / tl.sum(probabilities, 1)[:, None]  # takes out the rounding of lse
        dprobabilities = tl.dot(dout, value.T, input_precision=PRECISION)
        dropped = probabilities
        if DROPOUT:
            bits = BITS + row * width + j // 32
            keep = kept(bits, width, rows, length, keys, length - j, BLOCK_N // 32)
            dropped = tl.where(keep, probabilities, 0.0)
            dprobabilities = tl.where(keep, dprobabilities * keep_scale, 0.0)
        dvalue = tl.dot(dropped.to(dout.dtype).T, dout, input_precision=PRECISION) * keep_scale
        store_tile(dqueries_at + key_at + part, stride, length - j, dvalue, BLOCK_N, D, PADDED)
        if BLOCK_N >= BLOCK_M:
            delta = delta_of(probabilities, dprobabilities)
        dscores = (probabilities * (dprobabilities - delta[:, None])).to(query.dtype)
        dkey = tl.dot(dscores.T, query, input_precision=PRECISION) * scale
        store_tile(dqueries_at + key_at, stride, length - j, dkey, BLOCK_N, D, PADDED)
        dquery = tl.dot(dscores, key, dquery, input_precision=PRECISION)
    store_tile(dqueries_at, stride, length, dquery * scale, BLOCK_M, D, PADDED)
    if PARTS is not None:
        store_sum(PARTS, pair // heads * 2, heads, head, dquery * scale, D, PADDED)


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    GRAD, QKV, OUT, LSE, DELTA, DQKV, PARTS, CU, ORDER, BITS, first, blocks, heads, tokens, width, scale, keep_scale,
    D: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries; delta and, in fp32, what takes the rounding of lse out of a row for dkdv_kernel."""
    pair = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK_M
    head = pair % heads
    start, length = sequence_at(ORDER, CU, first + pair // heads)
    if i >= length:
        return
    stride, part = 3 * heads * D, heads * D
    far = stride.to(tl.int64)  # between tokens, where it multiplies more than a tile's rows
    keys_at = QKV + start * far + part + head * D
    row, out_at = head.to(tl.int64) * tokens + start + i, (start + i) * part + head * D
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    query = load_tile(keys_at - part + i * far, stride, length - i, BLOCK_M, D, PADDED)
    dout = load_tile(GRAD + out_at, part, length - i, BLOCK_M, D, PADDED)
    place = (pair // heads * blocks + i // BLOCK_M) * 2
    if PARTS is not None:
        store_sum(PARTS, place + 1, heads, head, dout, D, PADDED)
    delta = delta_of(load_tile(OUT + out_at, part, length - i, BLOCK_M, D, PADDED), dout)
    tl.store(DELTA + row + rows, delta, mask=rows < length - i)
    lse = tl.load(LSE + row + rows, mask=rows < length - i, other=0.0)[:, None]
    dquery = tl.zeros([BLOCK_M, PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)  # 1, but for the rounding of lse
    for j in range(0, length, BLOCK_N):
        key_at = keys_at + j * far
        key = load_tile(key_at, stride, length - j, BLOCK_N, D, PADDED)
        value = load_tile(key_at + part, stride, length - j, BLOCK_N, D, PADDED)
        scores = product(query, key, PRECISION)  # [BLOCK_M, BLOCK_N]
        probabilities = probabilities_of(scores, lse, scale, query.dtype == tl.float32)
        probabilities = tl.where(is_key(keys, length - j), probabilities, 0.0)
        if query.dtype == tl.float32:
            total += tl.sum(probabilities, 1)
        dprobabilities = product(dout, value, PRECISION)
        if DROPOUT:
            bits = BITS + row * width + j // 32
            keep = kept(bits, width, rows, length - i, keys, length - j, BLOCK_N // 32)
            dprobabilities = tl.where(keep, dprobabilities * keep_scale, 0.0)
        dscores = (probabilities * (dprobabilities - delta[:, None])).to(query.dtype)
        dquery = tl.dot(dscores, key, dquery, input_precision=PRECISION)
    if query.dtype == tl.float32:
        dquery = dquery / total[:, None]
        tl.store(DELTA + heads.to(tl.int64) * tokens + row + rows, 1 / total, mask=rows < length - i)
    dquery_at = DQKV + (start + i) * far + head * D
    store_tile(dquery_at, stride, length - i, dquery * scale, BLOCK_M, D, PADDED)
    if PARTS is not None:
        store_sum(PARTS, place, heads, head, dquery * scale, D, PADDED)


@triton.jit(do_not_specialize=VARYING)
def dkdv_kernel(
    GRAD, QKV, LSE, DELTA, DQKV, CU, ORDER, BITS, first, blocks, heads, tokens, width, scale, keep_scale,
    D: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, over tiles of queries."""
    pair = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * BLOCK_N
    head = pair % heads
    start, length = sequence_at(ORDER, CU, first + pair // heads)
    if j >= length:
        return
    stride, part = 3 * heads * D, heads * D
    far = stride.to(tl.int64)  # between tokens, where it multiplies more than a tile's rows
    place = start * far + head * D
    key_at = place + part + j * far
    key = load_tile(QKV + key_at, stride, length - j, BLOCK_N, D, PADDED)
    value = load_tile(QKV + key_at + part, stride, length - j, BLOCK_N, D, PADDED)
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    first_row = head.to(tl.int64) * tokens + start
    dkey = tl.zeros([BLOCK_N, PADDED], tl.float32)
    dvalue = tl.zeros([BLOCK_N, PADDED], tl.float32)
    for i in range(0, length, BLOCK_M):
        row = first_row + i
        query = load_tile(QKV + place + i * far, stride, length - i, BLOCK_M, D, PADDED)
        dout = load_tile(GRAD + (start + i) * part + head * D, part, length - i, BLOCK_M, D, PADDED)
        lse = tl.load(LSE + row + rows, mask=rows < length - i, other=0.0)[:, None]
        delta = tl.load(DELTA + row + rows, mask=rows < length - i, other=0.0)[:, None]
        scores = tl.dot(query, key.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        probabilities = probabilities_of(scores, lse, scale, query.dtype == tl.float32)
        if query.dtype == tl.float32:
            inverse = tl.load(DELTA + heads.to(tl.int64) * tokens + row + rows, mask=rows < length - i, other=0.0)
            probabilities = probabilities * inverse[:, None]
        dprobabilities = tl.dot(dout, value.T, input_precision=PRECISION)
        dropped = probabilities
        if DROPOUT:
            bits = BITS + row * width + j // 32
            keep = kept(bits, width, rows, length - i, keys, length - j, BLOCK_N // 32)
            dropped = tl.where(keep, probabilities, 0.0)
            dprobabilities = tl.where(keep, dprobabilities * keep_scale, 0.0)
        dvalue = tl.dot(dropped.to(dout.dtype).T, dout, dvalue, input_precision=PRECISION)
        dscores = (probabilities * (dprobabilities - delta)).to(query.dtype)
        dkey = tl.dot(dscores.T, query, dkey, input_precision=PRECISION)
    store_tile(DQKV + key_at, stride, length - j, dkey * scale, BLOCK_N, D, PADDED)
    store_tile(DQKV + key_at + part, stride, length - j, dvalue * keep_scale, BLOCK_N, D, PADDED)


def attention_reasons(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Why the kernels do not take the call, in words; empty: they do."""
    reasons = device_reasons(qkv.device) + dtype_reasons(qkv=qkv)
    if not 1 <= qkv.shape[3] <= LARGEST_DIM:
        reasons.append(f"head_dim {qkv.shape[3]} is not in 1 to {LARGEST_DIM}")
    if not scale > 0:
        reasons.append(f"scale {scale} is not over 0")
    return reasons


def attention_backward_reasons(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    keep_bits: Tensor | None, p: float, order: Tensor | None, classes: Sequence[int], needed: list[bool],
) -> list[str]:  # fmt: skip
    """Why the kernels do not take the call, in words; empty: they do."""
    reasons = attention_reasons(qkv, cu_seqlens, max_seqlen, scale, keep_bits, p, order, classes)
    for name, tensor in {"grad": grad, "out": out}.items():
        if tensor.dtype != qkv.dtype:
            reasons.append(f"{name} is {tensor.dtype}, qkv is {qkv.dtype}")
    return reasons


def keep_scale(p: float) -> float:
    """What a kept probability is multiplied with: probabilities are told by 16 bits."""
    dropped = int(p * 65536 + 0.5)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def launches(batch: int, max_seqlen: int, classes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first place in the order, number of sequences, longest) of each launch; longer classes first."""
    if not classes:
        yield 0, batch, max_seqlen
        return
    first = 0
    for count, bound in zip(reversed(classes), (max_seqlen, *reversed(CLASSES)), strict=True):
        if count:
            yield first, count, min(bound, max_seqlen)
        first += count


def width_of(keep_bits: Tensor | None) -> int:
    return 0 if keep_bits is None else keep_bits.shape[2]


def constants(tiles: Tiles, dim: int, keep_bits: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "D": dim, "PADDED": padded_dim(dim), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "DROPOUT": keep_bits is not None, "PRECISION": precision_of(dtype),
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.registers,
    }  # fmt: skip


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, keep_bits: Tensor | None = None, p: float = 0.0,
    order: Tensor | None = None, classes: Sequence[int] = (), bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """qkv [T, 3, N, D], keep_bits [N, T, W] → out [T, N, D], lse [N, T] fp32.

    order [B]: the sequences, longest first; classes: how many are in each length class and beyond the last.
    """
    tokens, _, heads, dim = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    qkv, cu_seqlens, keep_bits, order = dense(qkv, cu_seqlens, keep_bits, order)
    for first, count, longest in launches(cu_seqlens.shape[0] - 1, max_seqlen, classes):
        tiles = choose_tiles(longest, dim, qkv.dtype, card_of(qkv.device), precision_of(qkv.dtype))
        kernel, blocks = whole_forward_kernel if tiles.whole else forward_kernel, triton.cdiv(longest, tiles.block_m)
        kernel[(blocks * heads * count,)](
            qkv, out, lse, cu_seqlens, order, keep_bits, first, blocks, heads, tokens, width_of(keep_bits), scale,
            keep_scale(p), **constants(tiles, dim, keep_bits, qkv.dtype),
        )  # fmt: skip
    return out, lse


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def blocks_of_queries(longest: int, tiles: BackwardTiles) -> int:
    """How many programs share the queries of a sequence and head, at most."""
    return triton.cdiv(longest, tiles.dq.block_m) if tiles.dq else 1


def part_sums(qkv: Tensor, programs: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Zeros [P, 2, N, D] for the programs of each launch, and each launch's first row on, at bounds of 16 bytes."""
    starts = [0, *itertools.accumulate(triton.cdiv(count, 4) * 4 for count in programs)]
    parts = qkv.new_zeros(starts[-1], 2, *qkv.shape[2:], dtype=torch.float32)
    return parts, [parts[start:] for start in starts[:-1]]


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    keep_bits: Tensor | None, p: float, order: Tensor | None, classes: Sequence[int], needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad, out [T, N, D], lse [N, T] → dqkv [T, 3, N, D], and its sum over T [3, N, D].

    That of the keys is 0: a number added to all scores of a row does not change its softmax.
    """
    tokens, _, heads, dim = qkv.shape
    dqkv, dbias = qkv.new_empty(qkv.shape), qkv.new_zeros(qkv.shape[1:] if needed[1] else 0)
    if dqkv.numel() == 0:
        return dqkv if needed[0] else qkv.new_empty(0), dbias
    delta = lse.new_empty(2 if qkv.dtype == torch.float32 else 1, heads, tokens)
    grad, qkv, out, lse, cu_seqlens, keep_bits, order = dense(grad, qkv, out, lse, cu_seqlens, keep_bits, order)
    sizes, floats = (heads, tokens, width_of(keep_bits)), (scale, keep_scale(p))
    card, precision = card_of(qkv.device), precision_of(qkv.dtype)
    work = [
        (first, count, longest, choose_backward_tiles(longest, dim, qkv.dtype, card, precision))
        for first, count, longest in launches(cu_seqlens.shape[0] - 1, max_seqlen, classes)
    ]
    parts, places = None, [None] * len(work)
    if needed[1] and qkv.dtype != torch.float32 and keep_bits is None:  # the others have no registers left for sums
        parts, places = part_sums(qkv, [count * blocks_of_queries(longest, tiles) for _, count, longest, tiles in work])
    for (first, count, longest, chosen), sums in zip(work, places, strict=True):
        where = cu_seqlens, order, keep_bits, first
        if tiles := chosen.one_pass:
            one_pass_kernel[(heads * count,)](
                grad, qkv, out, lse, dqkv, sums, *where, *sizes, *floats, **constants(tiles, dim, keep_bits, qkv.dtype)
            )
        if tiles := chosen.dq:
            blocks = triton.cdiv(longest, tiles.block_m)
            dq_kernel[(blocks * heads * count,)](
                grad, qkv, out, lse, delta, dqkv, sums, *where, blocks, *sizes, *floats,
                **constants(tiles, dim, keep_bits, qkv.dtype),
            )  # fmt: skip
        if tiles := chosen.dkdv:
            blocks = triton.cdiv(longest, tiles.block_n)
            dkdv_kernel[(blocks * heads * count,)](
                grad, qkv, lse, delta, dqkv, *where, blocks, *sizes, *floats,
                **constants(tiles, dim, keep_bits, qkv.dtype),
            )  # fmt: skip
    if needed[1]:
        sums = sum_of_rows(dqkv[:, 0::2].flatten(1) if parts is None else parts.flatten(1), qkv.dtype)
        dbias[0::2] = sums.view(2, heads, dim)
    return dqkv if needed[0] else qkv.new_empty(0), dbias
