"""pad: packed rows back in their places, zeros in all others, and its gradient, in one pass over what is written.

Both gather rows. For `pad` the indices are inverted first: a write of 4 bytes a row, where clearing the output
before scattering into it would write all of it twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import device_reasons

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element → as which it is moved
INVERTED = 1024  # indices a program
MOST_ROWS, MOST_BLOCKS = 2**31 - 1, 65535  # of the inverted indices; of a grid's second dimension


@dataclass(frozen=True)
class Tiles:
    """rows, columns: of the output, that a program writes."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_tiles(hidden: int, itemsize: int) -> Tiles:
    divisor = min(hidden & -hidden, 512)  # the power of two in the hidden size: blocks without idle lanes
    columns = divisor if divisor >= 64 else min(triton.next_power_of_2(hidden), 512)
    return Tiles(max(8192 // itemsize // columns, 1), columns, 4, 1)  # 64 bytes a thread in flight; 128 spill


@triton.jit(do_not_specialize=["tokens", "rows"])
def invert_kernel(INDICES, INVERSE, tokens, rows, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(INDICES + token, mask=token < tokens, other=-1).to(tl.int64)
    # The largest, so that of tokens with one index the last stands there in every run
    tl.atomic_max(INVERSE + index, token, mask=(index >= 0) & (index < rows), sem="relaxed")


@triton.jit(do_not_specialize=["rows", "sources"])
def gather_kernel(X, SOURCE, OUT, rows, sources, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """OUT[row] = X[SOURCE[row]], zeros where X [sources, hidden] has no such row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(SOURCE + row, mask=row < rows, other=-1).to(tl.int64)
    is_column = (column < hidden)[None, :]
    has_source = ((source >= 0) & (source < sources))[:, None]
    x = tl.load(X + source[:, None] * hidden + column[None, :], mask=has_source & is_column, other=0)
    out = OUT + row.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(out, x, mask=(row < rows)[:, None] & is_column)


def gather(x: Tensor, source: Tensor, out: Tensor) -> Tensor:
    """out [R, H] = x [N, H] at source [R]."""
    rows, hidden = out.shape
    if rows and hidden:
        tiles = choose_tiles(hidden, x.element_size())
        bits = BITS[x.element_size()]
        gather_kernel[triton.cdiv(rows, tiles.rows), triton.cdiv(hidden, tiles.columns)](
            x.contiguous().view(bits), source, out.view(bits), rows, x.shape[0], hidden,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out


def reasons(x: Tensor, rows: int) -> list[str]:
    found = device_reasons(x.device)
    if x.element_size() not in BITS:
        found.append(f"elements of {x.element_size()} bytes: it moves 1, 2, 4 and 8")
    if rows > MOST_ROWS:
        found.append(f"{rows} padded rows, over {MOST_ROWS}")
    if x.shape[-1] > 64 * MOST_BLOCKS:
        found.append(f"hidden size {x.shape[-1]}, over {64 * MOST_BLOCKS}")
    return found


def pad_reasons(x: Tensor, indices: Tensor, batch: int, length: int) -> list[str]:
    return reasons(x, batch * length)


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """x [T, H], indices [T] → [B, S, H]; rows that are not in `indices` are zeros, indices outside B·S are left out."""
    rows, (tokens, hidden) = batch * length, x.shape
    inverse = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    if tokens and rows:
        invert_kernel[triton.cdiv(tokens, INVERTED),](indices.contiguous(), inverse, tokens, rows, BLOCK=INVERTED)
    return gather(x, inverse, x.new_empty(rows, hidden)).view(batch, length, hidden)


def pad_backward_reasons(grad: Tensor, indices: Tensor) -> list[str]:
    return reasons(grad, grad.shape[0] * grad.shape[1])


def pad_backward(grad: Tensor, indices: Tensor) -> Tensor:
    """grad [B, S, H] → its rows at `indices` [T, H]; zeros for indices outside B·S."""
    rows, hidden = grad.shape[0] * grad.shape[1], grad.shape[2]
    out = grad.new_empty(indices.shape[0], hidden)
    return gather(grad.reshape(rows, hidden), indices.contiguous(), out)
