"""Dropout's definition in numpy (docs/numerics.md, "Dropout"), which every backend must give bit for bit.

Philox4x32 with 7 rounds; an element takes 16 of the 128 bits of the counter (column >> 3, row, site, head).
"""

from __future__ import annotations

import math

import numpy as np
import torch

ROUNDS = 7


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> list[np.ndarray]:
    """Four arrays of 32-bit words, of one shape → four of that shape (Salmon et al. 2011, section 3.2)."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        high0, low0 = product0 >> np.uint64(32), product0 % 2**32
        high1, low1 = product1 >> np.uint64(32), product1 % 2**32
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def threshold(p: float) -> int:
    return math.floor(p * 65536 + 0.5)


def scale(p: float) -> float:
    return 65536 / (65536 - threshold(p)) if threshold(p) < 65536 else 0.0


def keep(seed: int, site: int, rows: int, columns: int, heads: int, p: float) -> np.ndarray:
    """bool [heads, rows, columns]: what is kept."""
    head, row, column = np.ogrid[:heads, :rows, : -(-columns // 8)]
    counter = np.broadcast_arrays(column, row, site, head)
    words = philox(tuple(counter), (seed % 2**32, seed // 2**32 % 2**32))
    halves = [half for word in words for half in (word % 2**16, word >> np.uint64(16))]  # low half first
    drawn = np.stack(halves, -1).reshape(heads, rows, 8 * words[0].shape[2])
    return (drawn >= threshold(p))[..., :columns]


def hidden(seed: int, site: int, rows: int, columns: int, p: float) -> tuple[torch.Tensor, float]:
    """What is kept of hidden states [rows, columns], and what it is multiplied with."""
    return torch.from_numpy(keep(seed, site, rows, columns, 1, p)[0]), scale(p)


def bits(seed: int, site: int, cu_seqlens: torch.Tensor, max_seqlen: int, heads: int, p: float) -> torch.Tensor:
    """int32 [heads, T, ⌈max_seqlen/32⌉]: bit k of word w of a row is key 32·w + k of its sequence, 0 past its end."""
    lengths = np.diff(cu_seqlens.numpy())
    width = -(-max_seqlen // 32) * 32
    kept = keep(seed, site, int(lengths.sum()), width, heads, p)
    kept &= np.arange(width) < np.repeat(lengths, lengths)[:, None]
    packed = np.packbits(kept, axis=-1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())
