"""bias_gelu: gelu(x + bias) behind a product of a library, and its gradients, each in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import Card, card_of, device_reasons, dtype_reasons
from .gelu import gelu
from .linear import with_bias
from .linear_gelu import gelu_backward


@dataclass(frozen=True)
class Tiles:
    """rows, columns: of a program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_tiles(columns: int, dtype: torch.dtype, card: Card) -> Tiles:
    # 16 elements a thread, two accesses of 128 bits in 16 bits; 512 divides 1536, 3072 and 4096
    return Tiles(4, 512, 4, 1) if columns > 256 else Tiles(16, 128, 4, 1)


@triton.jit(do_not_specialize=["tokens"])
def bias_gelu_kernel(
    X, BIAS, Y, tokens, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]  # [ROWS, COLUMNS]
    mask = (rows < tokens)[:, None] & (columns < N)[None, :]
    x = with_bias(tl.load(X + places, mask=mask, other=0.0).to(tl.float32), BIAS, columns, N)
    tl.store(Y + places, gelu(x, APPROXIMATE, Y.dtype.element_ty).to(Y.dtype.element_ty), mask=mask)


def bias_gelu_reasons(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> list[str]:
    return device_reasons(x.device) + dtype_reasons(x=x, bias=bias)


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """x [T, I], bias [I] → gelu(x + bias) [T, I]."""
    (tokens, columns), y = x.shape, torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        tiles = choose_tiles(columns, x.dtype, card_of(x.device))
        bias_gelu_kernel[triton.cdiv(tokens, tiles.rows), triton.cdiv(columns, tiles.columns)](
            x.contiguous(), None if bias is None else bias.contiguous(), y, tokens, columns, ROWS=tiles.rows,
            COLUMNS=tiles.columns, APPROXIMATE=approximate, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return y


def bias_gelu_backward_reasons(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> list[str]:
    return bias_gelu_reasons(x, bias) + dtype_reasons(grad=grad)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad [T, I] → the gradients of x, bias."""
    dx, dbias = gelu_backward(grad, x, approximate, bias)
    return dx if needed[0] else x.new_empty(0), dbias if needed[1] and bias is not None else x.new_empty(0)
