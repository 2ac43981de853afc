"""dropout_bits: which attention probabilities are kept, packed once a layer for attention's forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import Card, card_of, device_reasons
from .dropout import as_int32, is_kept, limit_of, threshold, words_of

MOST_HEADS = 65535  # of a grid's second dimension


@dataclass(frozen=True)
class Tiles:
    """rows: of a program; counters: of 8 keys, a byte each, computed at a time."""

    rows: int
    counters: int
    num_warps: int
    num_stages: int


def choose_tiles(card: Card) -> Tiles:
    # 4 counters a thread, which are independent, and one store of 32 bits; 16 are the 128 keys of a short sequence
    return Tiles(32, 16, 4, 1)


@triton.jit
def lengths_of(rows, CU_SEQLENS, batch, steps):
    """The lengths [ROWS] of the sequences in which packed rows stand; 0 behind the last.

    By bisection: the grid then follows the packed rows, with no block for padding and none that waits for the host,
    and log2(batch) steps on a few cached lines are little beside the generator.
    """
    first = rows * 0
    last = first + batch
    for _ in range(steps):
        middle = (first + last) // 2
        is_behind = tl.load(CU_SEQLENS + middle) > rows
        last = tl.where(is_behind, middle, last)
        first = tl.where(is_behind, first, middle)
    start, end = tl.load(CU_SEQLENS + first), tl.load(CU_SEQLENS + first + 1)
    return tl.where(rows < end, end - start, 0)


@triton.jit
def byte_of(seed, site, rows, head, counters, limit):
    """The keep bits of a counter's 8 keys: rows [ROWS, 1], counters [ROWS, BYTES] → [ROWS, BYTES] int32."""
    drawn = words_of(seed, site, rows, head, counters)
    bits = counters * 0
    for place in tl.static_range(4):
        low, high = is_kept(drawn[place], limit)
        bits |= tl.where(low, 1 << 2 * place, 0) | tl.where(high, 2 << 2 * place, 0)
    return bits


@triton.jit(do_not_specialize=["site", "tokens", "batch", "steps", "words", "limit", "all_kept"])
def dropout_bits_kernel(
    SEED, CU_SEQLENS, BITS, site, tokens, batch, steps, words, limit, all_kept, ROWS: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    head = tl.program_id(1)
    lengths = tl.where(rows < tokens, lengths_of(tl.minimum(rows, tokens - 1), CU_SEQLENS, batch, steps), 0)
    longest, seed, bytes = tl.max(lengths, 0), tl.load(SEED), 4 * words
    places = (head.to(tl.int64) * tokens + rows) * bytes  # [ROWS]
    for start in range(0, bytes, BYTES):
        counters = start + tl.arange(0, BYTES)[None, :] + tl.zeros([ROWS, 1], tl.int32)  # [ROWS, BYTES]
        bits = counters * 0
        if 8 * start < longest:
            inside = tl.minimum(tl.maximum(lengths[:, None] - 8 * counters, 0), 8)  # keys of the sequence
            bits = (byte_of(seed, site, rows[:, None], head, counters, limit) | all_kept) & ((1 << inside) - 1)
        mask = (rows < tokens)[:, None] & (counters < bytes)
        tl.store(BITS + places[:, None] + counters, bits.to(tl.uint8), mask=mask)


def dropout_bits_reasons(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> list[str]:
    reasons = device_reasons(seed.device)
    return reasons if heads <= MOST_HEADS else [*reasons, f"{heads} heads are over {MOST_HEADS}"]


def dropout_bits(
    seed: Tensor, site: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int, heads: int, p: float
) -> Tensor:
    """seed [] int64 → int32 [N, T, ⌈max_seqlen/32⌉]: bit k of word w is key 32·w + k, 0 past the sequence's end."""
    words, batch = -(-max_seqlen // 32), cu_seqlens.shape[0] - 1
    bits = seed.new_empty(heads, tokens, words, dtype=torch.int32)
    if not bits.numel():
        return bits
    tiles = choose_tiles(card_of(seed.device))
    dropout_bits_kernel[triton.cdiv(tokens, tiles.rows), heads](
        seed, cu_seqlens.contiguous(), bits.view(torch.uint8), as_int32(site), tokens, batch, batch.bit_length(), words,
        limit_of(p), 0 if threshold(p) else -1, ROWS=tiles.rows, BYTES=tiles.counters,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return bits
