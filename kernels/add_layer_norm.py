"""add_layer_norm: LayerNorm(residual + dropout(x + bias)) in one pass over memory, and its gradients in one more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cards import Card, card_of, device_reasons, dtype_reasons
from .dropout import as_int32, keep_scale, kept, limit_of, threshold

MOST_HIDDEN = 8192
SUMMED_COLUMNS, SUMMED_PROGRAMS = 32, 128  # of a tile of partial sums


@dataclass(frozen=True)
class Tiles:
    """rows, columns: of a tile, whose columns hold whole rows; ctas: at least so many fit a multiprocessor."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    ctas: int


def choose_tiles(hidden: int, dtype: torch.dtype, card: Card) -> Tiles:
    """Tiles of the forward, which reads each row once."""
    columns = max(8, triton.next_power_of_2(hidden))
    # 32 elements a lane: up to 1024 columns a warp holds whole rows and adds them up without a barrier
    num_warps = max(1, columns // 1024)
    return Tiles(max(1, 1024 // columns), columns, num_warps, 1, 16 // num_warps)


def choose_backward_tiles(hidden: int, dtype: torch.dtype, card: Card) -> Tiles:
    """Tiles of the backward, whose programs walk over the rows with three sums of their own."""
    columns = max(8, triton.next_power_of_2(hidden))
    num_warps = min(16, max(4, columns // 256))  # 8 elements a lane, and their sums beside them
    num_stages = 3 if columns <= 2048 else 2 if columns <= 4096 else 1  # as shared memory holds tiles on their way
    if dtype == torch.float32 and card.shared_memory < 2**17:
        num_stages = min(num_stages, 2)
    return Tiles(max(1, 1024 // columns), columns, num_warps, num_stages, 16 // num_warps)


@triton.jit
def row_mean(x, factor, H: tl.constexpr, EXACT: tl.constexpr):
    """The mean of x · factor, a number or [ROWS, COLUMNS], zeros from column H on → [ROWS, 1].

    EXACT, for fp32 inputs: rounded once; else sums of 8 in float32, of these in float64.
    """
    if EXACT:
        total = tl.sum(x.to(tl.float64) * factor, 1)
    else:
        total = tl.sum(tl.sum(tl.reshape(x * factor, [x.shape[0], x.shape[1] // 8, 8]), 2).to(tl.float64), 1)
    return (total * (1.0 / H)).to(tl.float32)[:, None]


@triton.jit
def row_statistics(x, inside, eps, H: tl.constexpr, EXACT: tl.constexpr):
    """x [ROWS, COLUMNS], zeros where not inside (from column H on) → x - mean; mean and rstd [ROWS, 1]."""
    mean = row_mean(x, 1.0, H, EXACT)
    centred = tl.where(inside, x - mean, 0.0)
    return centred, mean, reciprocal_root(row_mean(centred, centred, H, EXACT) + eps)


@triton.jit
def reciprocal_root(x):
    """1/√x in float32, to the nearest: tl.rsqrt is approximate, and a Newton step in float64 corrects it."""
    root, wide = tl.rsqrt(x).to(tl.float64), x.to(tl.float64)
    return (root + root * (0.5 - 0.5 * wide * root * root)).to(tl.float32)


@triton.jit
def row_gradients(grad, normalized, gamma, rstd, H: tl.constexpr, EXACT: tl.constexpr):
    """grad, normalized [ROWS, COLUMNS], grad zeros from column H on → the gradient of LayerNorm's input.

    Ba et al. 2016: rstd · (grad·γ - mean(grad·γ) - normalized · mean(grad·γ · normalized)).
    """
    if H == 1:
        return grad * 0.0  # what one element is normalized to does not depend on it
    projection = row_mean(grad * gamma, normalized, H, EXACT)
    projected = tl.fma(normalized, projection, row_mean(grad, gamma, H, EXACT))
    return tl.fma(grad, gamma, -projected) * rstd  # rounded once where both are near to each other


@triton.jit
def sum_of(
    x, bias, residual, seed, site, rows, limit, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr
):
    """residual + dropout(x + bias) [ROWS, COLUMNS]; bias [1, COLUMNS]."""
    x = x.to(tl.float32) + bias
    if DROPS:
        x = kept(x, seed, site, rows, limit, scale, ROWS, COLUMNS)
    return residual.to(tl.float32) + x


@triton.jit
def row_of(POINTER, columns, H: tl.constexpr):
    """[H] → [1, COLUMNS] float32."""
    return tl.load(POINTER + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["tokens", "site", "limit"])
def forward_kernel(
    X, BIAS, RESIDUAL, GAMMA, BETA, Y, MEAN, RSTD, SEED, tokens, eps, site, limit, scale, H: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < tokens)[:, None] & (columns < H)[None, :]  # [ROWS, COLUMNS]
    places = rows.to(tl.int64)[:, None] * H + columns[None, :]
    x, residual = tl.load(X + places, mask=inside, other=0.0), tl.load(RESIDUAL + places, mask=inside, other=0.0)
    bias, seed = tl.zeros([1, COLUMNS], tl.float32), 0
    if BIAS is not None:
        bias = row_of(BIAS, columns, H)
    if DROPS:
        seed = tl.load(SEED)
    total = sum_of(x, bias, residual, seed, site, rows, limit, scale, ROWS, COLUMNS, DROPS)
    centred, mean, rstd = row_statistics(total, columns[None, :] < H, eps, H, X.dtype.element_ty == tl.float32)
    y = tl.fma(centred * rstd, row_of(GAMMA, columns, H), row_of(BETA, columns, H))
    tl.store(Y + places, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + rows[:, None], mean, mask=(rows < tokens)[:, None])
    tl.store(RSTD + rows[:, None], rstd, mask=(rows < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens", "site", "limit"])
def backward_kernel(
    GRAD, X, BIAS, RESIDUAL, GAMMA, MEAN, RSTD, DX, DRESIDUAL, PARTS, SEED, tokens, site, limit, scale,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dresidual; PARTS [3, programs, H]: each program's sums of dgamma, dbeta and dbias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, COLUMNS)
    gamma, bias, seed = row_of(GAMMA, columns, H), tl.zeros([1, COLUMNS], tl.float32), 0
    if BIAS is not None:
        bias = row_of(BIAS, columns, H)
    if DROPS:
        seed = tl.load(SEED)
    dgamma = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbeta, dbias = dgamma, dgamma
    for start in tl.range(program * ROWS, tokens, programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)  # [ROWS]
        inside = (rows < tokens)[:, None] & (columns < H)[None, :]  # [ROWS, COLUMNS]
        places = rows.to(tl.int64)[:, None] * H + columns[None, :]
        grad = tl.load(GRAD + places, mask=inside, other=0.0).to(tl.float32)
        x, residual = tl.load(X + places, mask=inside, other=0.0), tl.load(RESIDUAL + places, mask=inside, other=0.0)
        mean = tl.load(MEAN + rows, mask=rows < tokens, other=0.0)[:, None]
        rstd = tl.load(RSTD + rows, mask=rows < tokens, other=0.0)[:, None]
        total = sum_of(x, bias, residual, seed, site, rows, limit, scale, ROWS, COLUMNS, DROPS)
        normalized = (total - mean) * rstd
        dtotal = row_gradients(grad, normalized, gamma, rstd, H, X.dtype.element_ty == tl.float32)
        dgamma += grad * normalized
        dbeta += grad
        tl.store(DRESIDUAL + places, dtotal.to(DRESIDUAL.dtype.element_ty), mask=inside)
        dx = dtotal
        if DROPS:
            if DX.dtype == DRESIDUAL.dtype:  # as autograd does it: the sum's gradient is a tensor of its dtype
                dx = dtotal.to(DX.dtype.element_ty).to(tl.float32)
            dx = kept(dx, seed, site, rows, limit, scale, ROWS, COLUMNS)
        tl.store(DX + places, dx.to(DX.dtype.element_ty), mask=inside)
        dbias += tl.where(inside, dx, 0.0)
    store_part(PARTS, 0, program, programs, dgamma, columns, H)
    store_part(PARTS, 1, program, programs, dbeta, columns, H)
    store_part(PARTS, 2, program, programs, dbias, columns, H)


@triton.jit
def store_part(PARTS, which, program, programs, sums, columns, H: tl.constexpr):
    """sums [ROWS, COLUMNS], added up in float64, to PARTS [which, program]."""
    place = (which * programs + program).to(tl.int64) * H
    tl.store(PARTS + place + columns, column_sums(sums), mask=columns < H)


@triton.jit
def column_sums(x):
    """x [ROWS, COLUMNS] → [COLUMNS], rounded once."""
    return tl.sum(x.to(tl.float64), 0).to(tl.float32)


@triton.jit(do_not_specialize=["programs"])
def add_parts_kernel(PARTS, OUT, programs, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """PARTS [programs, H] → OUT [H], added up in one order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        inside = (rows < programs) & (columns < H)[None, :]
        total += tl.load(PARTS + rows.to(tl.int64) * H + columns[None, :], mask=inside, other=0.0)
    tl.store(OUT + columns, column_sums(total).to(OUT.dtype.element_ty), mask=columns < H)


def add_parts(parts: Tensor, like: Tensor, needed: bool) -> Tensor:
    """parts [programs, H] float32 → their sum [H] in the dtype of `like`, zeros of no parts; empty if not needed."""
    programs, hidden = parts.shape
    if not needed:
        return like.new_empty(0)
    if not programs:
        return like.new_zeros(hidden)
    out = like.new_empty(hidden)
    add_parts_kernel[(triton.cdiv(hidden, SUMMED_COLUMNS),)](
        parts, out, programs, H=hidden, ROWS=SUMMED_PROGRAMS, COLUMNS=SUMMED_COLUMNS, num_warps=4, num_stages=1
    )
    return out


def programs_of(tokens: int, tiles: Tiles, card: Card) -> int:
    """How many programs share the rows: as many as run at a time, but each has 4 tiles.

    With fewer, the partial sums would be as much to move as the rows.
    """
    return min(card.multiprocessors * tiles.ctas, triton.cdiv(tokens, 4 * tiles.rows))


def dropout_arguments(p: float, seed: Tensor | None, site: int) -> dict[str, object]:
    """What the row kernels take of dropout."""
    if seed is None or not threshold(p):
        return {"SEED": None, "site": 0, "limit": 0, "scale": 1.0, "DROPS": False}
    return {"SEED": seed, "site": as_int32(site), "limit": limit_of(p), "scale": keep_scale(p), "DROPS": True}


def hidden_reasons(hidden: int) -> list[str]:
    return [] if 1 <= hidden <= MOST_HIDDEN else [f"hidden size {hidden} is none of 1 to {MOST_HIDDEN}"]


def add_layer_norm_reasons(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
    seed: Tensor | None = None, site: int = 0,
) -> list[str]:  # fmt: skip
    reasons = device_reasons(x.device) + hidden_reasons(x.shape[1])
    return reasons + dtype_reasons(x=x, bias=bias, residual=residual, gamma=gamma, beta=beta)


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0,
    seed: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual [T, H] → LayerNorm(residual + dropout(x + bias)) in the residual's dtype, mean, rstd [T] float32."""
    tokens, hidden = x.shape
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    if not tokens:
        return y, mean, rstd
    tiles = choose_tiles(hidden, residual.dtype, card_of(x.device))
    forward_kernel[(triton.cdiv(tokens, tiles.rows),)](
        x.contiguous(), contiguous(bias), residual.contiguous(), gamma.contiguous(), beta.contiguous(), y, mean, rstd,
        tokens=tokens, eps=eps, H=hidden, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **dropout_arguments(p, seed, site),
    )  # fmt: skip
    return y, mean, rstd


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def add_layer_norm_backward_reasons(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Tensor | None, site: int, needed: list[bool],
) -> list[str]:  # fmt: skip
    reasons = device_reasons(x.device) + hidden_reasons(x.shape[1])
    return reasons + dtype_reasons(grad=grad, x=x, bias=bias, residual=residual, gamma=gamma)


def add_layer_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    p: float, seed: Tensor | None, site: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad [T, H] → the gradients of x, bias, residual, gamma, beta, each in its input's dtype."""
    tokens, hidden = x.shape
    card = card_of(x.device)
    tiles = choose_backward_tiles(hidden, residual.dtype, card)
    programs = programs_of(tokens, tiles, card)
    dx, dresidual = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, residual))
    parts = x.new_empty(3, programs, hidden, dtype=torch.float32)
    if tokens:
        backward_kernel[(programs,)](
            grad.contiguous(), x.contiguous(), contiguous(bias), residual.contiguous(), gamma.contiguous(),
            mean.contiguous(), rstd.contiguous(), dx, dresidual, parts, tokens=tokens, H=hidden, ROWS=tiles.rows,
            COLUMNS=tiles.columns, STAGES=tiles.num_stages, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages, **dropout_arguments(p, seed, site),
        )  # fmt: skip
    dgamma, dbeta = (add_parts(part, gamma, want) for part, want in zip(parts, needed[3:], strict=False))
    dbias = add_parts(parts[2], x if bias is None else bias, needed[1] and bias is not None)
    return dx if needed[0] else x.new_empty(0), dbias, dresidual if needed[2] else residual.new_empty(0), dgamma, dbeta
