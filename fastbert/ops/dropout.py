"""Which elements dropout keeps: one definition for every backend (docs/numerics.md, "Dropout"), in torch arithmetic.

Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), 16 bits an element: what is kept
depends on the seed, the site in the model, the head, the row and the column alone, never on padding or tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
PER_COUNTER = 8  # elements that share a counter: 4 words of two halves
BLOCK_COUNTERS = 1 << 14  # counters computed at a time: their int64 words stay in a CPU's cache

# The sites of a layer; a model's layer i has sites 4·i + these. The embeddings are site 3 of layer 0.
ATTENTION_PROBABILITIES, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, EMBEDDINGS = range(4)


def site_of(layer: int, place: int) -> int:
    """The site of a place in a layer."""
    return 4 * layer + place


def threshold(p: float) -> int:
    """An element is kept iff its 16 bits are at least this: floor(p·65536 + 0.5)."""
    return int(p * 65536 + 0.5)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied with: 65536 / (65536 − threshold); 0 where nothing is kept."""
    dropped = threshold(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def philox(c0: Tensor, c1: Tensor, c2: int, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 4 words of 32 bits (in int64) of each counter (c0, c1, c2, c3), which broadcast; key: the int64 seed."""
    keys = [seed.reshape(()) & WORD, (seed.reshape(()) >> 32) & WORD]
    a, b, c, d = c0, c1, torch.full_like(c0, c2), c3
    for _ in range(ROUNDS):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # int64 wraps: their 64 bits are the product's
        a, b = ((right >> 32) & WORD) ^ b ^ keys[0], right & WORD
        c, d = ((left >> 32) & WORD) ^ d ^ keys[1], left & WORD
        keys = [(key + step) & WORD for key, step in zip(keys, KEY_STEPS, strict=True)]
    return a, b, c, d


def keep_bytes(seed: Tensor, site: int, rows: Tensor, columns: int, heads: Tensor, p: float) -> Tensor:
    """rows [R], heads [N] → uint8 [N, R, ⌈columns/8⌉]: bit k of byte c says whether column 8·c + k is kept."""
    counters = torch.arange(-(-columns // PER_COUNTER), device=rows.device)
    words = philox(counters, rows[:, None], site, heads[:, None, None], seed)
    least, packed = threshold(p), None
    for place, word in enumerate(words):
        low, high = ((word & 0xFFFF) >= least).byte(), ((word >> 16) >= least).byte()
        part = (low << (2 * place)) | (high << (2 * place + 1))
        packed = part if packed is None else packed | part
    assert packed is not None
    return packed


def blocks(rows: int, counters: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the blocks of rows that are computed at a time."""
    step = max(1, BLOCK_COUNTERS // max(counters, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def unpacked(packed: Tensor, columns: int) -> Tensor:
    """packed uint8 [..., C] → bool [..., columns], bit k of byte c is column 8·c + k."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(-2)[..., :columns].bool()


def keep_rows(seed: Tensor, site: int, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of hidden states [rows, columns] are kept: bool [rows, columns]."""
    device = seed.device
    head, packed = torch.zeros(1, dtype=torch.int64, device=device), []
    for start, end in blocks(rows, columns // PER_COUNTER):
        packed.append(keep_bytes(seed, site, torch.arange(start, end, device=device), columns, head, p)[0])
    return unpacked(torch.cat(packed), columns) if packed else seed.new_empty(0, columns, dtype=torch.bool)


def kept(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """x → x·scale where kept, 0 elsewhere, in x's dtype; None: nothing is dropped."""
    return x if keep is None else torch.where(keep, x * keep_scale(p), 0)
