"""unpad: where the real tokens of a padded batch stand, and in which order its sequences are worked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import device_reasons

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element → as which it is read
MASKS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
MOST = 2**31 - 1  # of cu_seqlens


@dataclass(frozen=True)
class Tiles:
    """rows, columns: of the mask, of which a program reads all columns; sequences: that it ranks, among `others` at a
    time.
    """

    rows: int
    columns: int
    sequences: int
    others: int
    num_warps: int
    num_stages: int


def choose_tiles() -> Tiles:
    # The same for every batch: none recompiles, and a mask is small beside what follows
    return Tiles(rows=4, columns=256, sequences=32, others=64, num_warps=4, num_stages=1)


@triton.jit
def real_tokens(MASK, rows, columns, batch, length, row_stride, IS_FLOAT: tl.constexpr):
    """Which elements [ROWS, COLUMNS] are not zero, 1 or 0; of floats without the sign bit, as -0.0 is zero."""
    inside = (rows < batch)[:, None] & (columns < length)[None, :]
    bits = tl.load(MASK + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=inside, other=0)
    return ((bits << 1) != 0).to(tl.int32) if IS_FLOAT else (bits != 0).to(tl.int32)


@triton.jit(do_not_specialize=["batch", "length", "row_stride"])
def count_kernel(
    MASK, LENGTHS, batch, length, row_stride, IS_FLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counts = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, length, COLUMNS):
        counts += real_tokens(MASK, rows, start + tl.arange(0, COLUMNS), batch, length, row_stride, IS_FLOAT)
    tl.store(LENGTHS + rows, tl.sum(counts, 1), mask=rows < batch)


@triton.jit(do_not_specialize=["batch"])
def rank_kernel(LENGTHS, CU_SEQLENS, ORDER, batch, SEQUENCES: tl.constexpr, OTHERS: tl.constexpr):
    """Each sequence compares itself with all others: the tokens before it, and how many are worked on before it."""
    mine = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    length = tl.load(LENGTHS + mine, mask=mine < batch, other=0)
    tokens, before = tl.zeros([SEQUENCES, OTHERS], tl.int32), tl.zeros([SEQUENCES, OTHERS], tl.int32)
    for start in range(0, batch, OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = tl.load(LENGTHS + others, mask=others < batch, other=-1)[None, :]
        is_above = others[None, :] < mine[:, None]
        tokens += tl.where(is_above, theirs, 0)
        before += ((theirs > length[:, None]) | ((theirs == length[:, None]) & is_above)).to(tl.int32)
    tl.store(CU_SEQLENS + 1 + mine, tl.sum(tokens, 1) + length, mask=mine < batch)
    tl.store(CU_SEQLENS + mine, mine, mask=mine == 0)
    tl.store(ORDER + tl.sum(before, 1), mine, mask=mine < batch)


@triton.jit(do_not_specialize=["batch", "length", "row_stride", "tokens"])
def write_kernel(
    MASK, CU_SEQLENS, INDICES, batch, length, row_stride, tokens,
    IS_FLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ends = tl.load(CU_SEQLENS + rows, mask=rows < batch, other=0)
    for start in range(0, length, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        real = real_tokens(MASK, rows, columns, batch, length, row_stride, IS_FLOAT)  # [ROWS, COLUMNS]
        places = ends[:, None] + tl.cumsum(real, 1) - 1
        indices = rows.to(tl.int64)[:, None] * length + columns[None, :]
        tl.store(INDICES + places, indices, mask=(real != 0) & (places < tokens))
        ends += tl.sum(real, 1)
    total, first = tl.load(CU_SEQLENS + batch), tl.program_id(0) * COLUMNS
    for start in range(total + first, tokens, tl.num_programs(0) * COLUMNS):  # none, if `tokens` is right
        places = start + tl.arange(0, COLUMNS)
        tl.store(INDICES + places, places.to(tl.int64) * 0 - 1, mask=places < tokens)


def unpad_reasons(mask: Tensor, tokens: int = -1) -> list[str]:
    reasons = device_reasons(mask.device)
    if mask.dtype not in MASKS:
        reasons.append(f"mask is {mask.dtype}: it takes bool, integers and floats of 16 to 64 bits")
    if mask.numel() > MOST:
        reasons.append(f"a mask of {mask.numel()} elements, over {MOST}")
    return reasons


def unpad(mask: Tensor, tokens: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """mask [B, S], nonzero = real → indices [T] int64 into B·S, cu_seqlens [B+1] int32, order [B] int32, longest first.

    tokens: T, where the host knows it; -1: the host waits for the device to learn it. Of more tokens than there are the
    last indices are -1, of fewer the last are left out.
    """
    batch, length = mask.shape
    cu_seqlens, order, lengths = (mask.new_empty(n, dtype=torch.int32) for n in (batch + 1, batch, batch))
    if not batch:
        return mask.new_full((max(tokens, 0),), -1, dtype=torch.int64), cu_seqlens.zero_(), order
    bits = (mask if mask.stride(1) == 1 else mask.contiguous()).view(BITS[mask.element_size()])
    tiles, shape = choose_tiles(), (batch, length, bits.stride(0))
    sizes = {"IS_FLOAT": mask.is_floating_point(), "ROWS": tiles.rows, "COLUMNS": tiles.columns}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    programs = (triton.cdiv(batch, tiles.rows),)
    count_kernel[programs](bits, lengths, *shape, **sizes, **options)
    rank_kernel[triton.cdiv(batch, tiles.sequences),](
        lengths, cu_seqlens, order, batch, SEQUENCES=tiles.sequences, OTHERS=tiles.others, **options
    )
    if tokens < 0:
        tokens = int(cu_seqlens[-1])
    indices = mask.new_empty(tokens, dtype=torch.int64)
    if tokens:
        write_kernel[programs](bits, cu_seqlens, indices, *shape, tokens, **sizes, **options)
    return indices, cu_seqlens, order
