"""Dropout's definition on the device: which elements are kept (docs/numerics.md, "Dropout").

Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counter (column >> 3, row, site,
head); 16 bits an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
PER_COUNTER = tl.constexpr(8)  # elements that share a counter: 4 words of two halves


def threshold(p: float) -> int:
    """An element is kept iff its 16 bits are at least this: floor(p·65536 + 0.5)."""
    return int(p * 65536 + 0.5)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied with; 0 where nothing is kept."""
    least = threshold(p)
    return 65536 / (65536 - least) if least < 65536 else 0.0


def as_int32(value: int) -> int:
    """The int32 with the 32 bits of a value: whatever it is, the kernel's argument has one type."""
    return (value + 2**31) % 2**32 - 2**31


def limit_of(p: float) -> int:
    """What `is_kept` compares with, as an int32; p of at least 2^-17 (below that nothing is dropped)."""
    return as_int32((threshold(p) << 16) - 1)


@triton.jit
def words_of(seed, site, row, head, counter):
    """The 4 words of 32 bits of a counter; row and counter broadcast."""
    return tl.philox(seed, counter, row, site, head, ROUNDS)


@triton.jit
def is_kept(word, limit):
    """Whether the elements of the low and of the high half of a word are kept.

    u16 >= thr iff (u16 << 16) > (thr << 16) - 1, whatever stands in the 16 bits below: a shift serves both halves, and
    thr = 65536 fits 32 bits.
    """
    least = limit.to(tl.uint32, bitcast=True)
    return (word << 16) > least, word > least


@triton.jit
def kept(x, seed, site, rows, limit, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] of the hidden states' rows [ROWS] after dropout; COLUMNS from 8 on."""
    counters = tl.arange(0, COLUMNS // PER_COUNTER)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    a, b, c, d = words_of(seed, site, rows[:, None], 0, counters)  # [ROWS, COLUMNS / 8]
    low, high = is_kept(tl.join(tl.join(a, c), tl.join(b, d)), limit)  # [ROWS, COLUMNS / 8, 2, 2]: words a, b, c, d
    keep = tl.reshape(tl.join(low, high), [ROWS, COLUMNS])
    return tl.where(keep, x * scale, 0.0)
