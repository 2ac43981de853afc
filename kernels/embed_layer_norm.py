"""embed_layer_norm: dropout(LayerNorm(words + token types + positions)) in one pass, and the gradients of the tables.

A row of which an id, a type or a position stands outside its table is NaN, for no kernel can raise: nothing is read
outside, and such a row gives no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_layer_norm import (
    Tiles,
    add_parts,
    choose_tiles,
    contiguous,
    dropout_arguments,
    hidden_reasons,
    programs_of,
    row_gradients,
    row_of,
    row_statistics,
    store_part,
)
from .add_layer_norm import choose_backward_tiles as choose_row_tiles
from .cards import SPILLING, Card, card_of, device_reasons, dtype_reasons
from .dropout import kept

SITE = tl.constexpr(3)  # of the embeddings' dropout
AHEAD = tl.constexpr(4)  # rows on their way at a time while runs are added up


@dataclass(frozen=True)
class RunTiles:
    """chunk: sorted rows that one program adds up; parts: chunks whose sums are added up at a time."""

    chunk: int
    columns: int
    parts: int
    num_warps: int
    num_stages: int


def choose_backward_tiles(hidden: int, dtype: torch.dtype, card: Card) -> Tiles:
    """Those of add_layer_norm's backward; in fp32, with exact means and indices, 4 elements a lane: 8 are spilled."""
    tiles = choose_row_tiles(hidden, dtype, card)
    if dtype == torch.float32:
        num_warps = min(16, max(4, tiles.columns // 128))
    elif dtype == torch.float16 and card.arch in SPILLING:
        num_warps = min(16, max(8, tiles.columns // 128))
    else:
        return tiles
    return replace(tiles, num_warps=num_warps, ctas=16 // num_warps)


def choose_run_tiles(hidden: int, dtype: torch.dtype, card: Card) -> RunTiles:
    # narrow warps: many of them where tokens are few, each with AHEAD rows of 1 KB on their way
    return RunTiles(32, min(256, max(8, triton.next_power_of_2(hidden))), 4, 1, 1)


@triton.jit
def place_in(POINTER, rows, tokens, size):
    """Indices of rows [ROWS] of a table of `size` rows → which there are, and the row to read [ROWS], 0 for others."""
    index = tl.load(POINTER + rows, mask=rows < tokens, other=0).to(tl.int64)
    is_inside = (index >= 0) & (index < size)
    return is_inside, tl.where(is_inside, index, 0)


@triton.jit
def table_rows(TABLE, places, columns, inside, H: tl.constexpr):
    """places [ROWS] int64 → rows of a table [ROWS, COLUMNS] float32."""
    return tl.load(TABLE + places[:, None] * H + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "word_rows", "type_rows", "position_rows", "site", "limit"])
def forward_kernel(
    IDS, TYPES, POSITIONS, WORD_TABLE, TYPE_TABLE, POSITION_TABLE, GAMMA, BETA, Y, MEAN, RSTD, PRE, SEED, tokens,
    word_rows, type_rows, position_rows, eps, site, limit, scale, H: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < tokens)[:, None] & (columns < H)[None, :]  # [ROWS, COLUMNS]
    is_real, word = place_in(IDS, rows, tokens, word_rows)
    has_position, position = place_in(POSITIONS, rows, tokens, position_rows)
    is_real &= has_position
    total = table_rows(WORD_TABLE, word, columns, inside, H)
    if TYPES is not None:
        has_type, kind = place_in(TYPES, rows, tokens, type_rows)
        is_real &= has_type
        total += table_rows(TYPE_TABLE, kind, columns, inside, H)
    total += table_rows(POSITION_TABLE, position, columns, inside, H)
    total = tl.where(is_real[:, None], total, float("nan"))
    places = rows.to(tl.int64)[:, None] * H + columns[None, :]
    if PRE is not None:
        tl.store(PRE + places, total.to(PRE.dtype.element_ty), mask=inside)
    exact: tl.constexpr = WORD_TABLE.dtype.element_ty == tl.float32
    centred, mean, rstd = row_statistics(tl.where(inside, total, 0.0), columns[None, :] < H, eps, H, exact)
    y = tl.fma(centred * rstd, row_of(GAMMA, columns, H), row_of(BETA, columns, H))
    if DROPS:
        y = kept(y, tl.load(SEED), site, rows, limit, scale, ROWS, COLUMNS)
    tl.store(Y + places, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + rows[:, None], mean, mask=(rows < tokens)[:, None])
    tl.store(RSTD + rows[:, None], rstd, mask=(rows < tokens)[:, None])


@triton.jit
def store_keys(KEYS, rows, tokens, is_real, places, padding, size):
    """The rows of a table [ROWS] to which rows' gradients belong; `size`, behind the last: to none."""
    keys = tl.where(is_real & (places != padding), places, size)
    tl.store(KEYS + rows, keys.to(KEYS.dtype.element_ty), mask=rows < tokens)


@triton.jit(
    do_not_specialize=[
        "tokens", "word_rows", "type_rows", "position_rows", "word_padding", "position_padding", "site", "limit",
    ]
)  # fmt: skip
def backward_kernel(
    GRAD, IDS, TYPES, POSITIONS, WORD_TABLE, TYPE_TABLE, POSITION_TABLE, GAMMA, MEAN, RSTD, PRE, DX, WORD_KEYS,
    TYPE_KEYS, POSITION_KEYS, PARTS, SEED, tokens, word_rows, type_rows, position_rows, word_padding, position_padding,
    site, limit, scale, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """DX [T, H] float32 and the KEYS [T] of its rows; PARTS [2, programs, H]: each program's dgamma and dbeta."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, COLUMNS)
    gamma, seed = row_of(GAMMA, columns, H), 0
    if DROPS:
        seed = tl.load(SEED)
    dgamma = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbeta = dgamma
    for start in range(program * ROWS, tokens, programs * ROWS):
        rows = start + tl.arange(0, ROWS)  # [ROWS]
        is_real, word = place_in(IDS, rows, tokens, word_rows)
        has_position, position = place_in(POSITIONS, rows, tokens, position_rows)
        is_real &= has_position & (rows < tokens)
        if TYPES is not None:
            has_type, kind = place_in(TYPES, rows, tokens, type_rows)
            is_real &= has_type
            store_keys(TYPE_KEYS, rows, tokens, is_real, kind, -1, type_rows)
        store_keys(WORD_KEYS, rows, tokens, is_real, word, word_padding, word_rows)
        store_keys(POSITION_KEYS, rows, tokens, is_real, position, position_padding, position_rows)
        inside = is_real[:, None] & (columns < H)[None, :]  # [ROWS, COLUMNS]
        places = rows.to(tl.int64)[:, None] * H + columns[None, :]
        grad = tl.load(GRAD + places, mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            grad = kept(grad, seed, site, rows, limit, scale, ROWS, COLUMNS)
        if PRE is not None:
            total = tl.load(PRE + places, mask=inside, other=0.0).to(tl.float32)
        else:
            total = table_rows(WORD_TABLE, word, columns, inside, H)
            if TYPES is not None:
                total += table_rows(TYPE_TABLE, kind, columns, inside, H)
            total += table_rows(POSITION_TABLE, position, columns, inside, H)
        mean = tl.load(MEAN + rows, mask=is_real, other=0.0)[:, None]
        rstd = tl.load(RSTD + rows, mask=is_real, other=0.0)[:, None]
        normalized = (total - mean) * rstd
        dx = row_gradients(grad, normalized, gamma, rstd, H, WORD_TABLE.dtype.element_ty == tl.float32)
        tl.store(DX + places, dx, mask=inside)
        dgamma += grad * normalized
        dbeta += grad
    store_part(PARTS, 0, program, programs, dgamma, columns, H)
    store_part(PARTS, 1, program, programs, dbeta, columns, H)


@triton.jit
def row_at(DX, ORDER, at, key, size, columns, H: tl.constexpr):
    """The row of DX at a place of the sorted order [COLUMNS]; zeros where its key is none of the table's."""
    is_used = (key >= 0) & (key < size)
    row = tl.load(ORDER + at, mask=is_used, other=0)
    return tl.load(DX + row * H + columns, mask=columns < tl.where(is_used, H, 0), other=0.0)


@triton.jit
def key_at(KEYS, at, tokens):
    """The key at a place of the sorted order, -1 where there is no such place."""
    return tl.load(KEYS + at, mask=(at >= 0) & (at < tokens), other=-1).to(tl.int32)


@triton.jit
def add_row(total, is_later, row, before, key, after, is_last, TABLE, PARTS, size, columns, H: tl.constexpr):
    """Adds a row to its run; where the run, or this chunk's part of it, ends: stores the sum.

    A run that lies in one chunk goes to TABLE. Of one that does not, PARTS [2, H] takes this chunk's part: [0] of a run
    that began in an earlier chunk (is_later), [1] of one that begins here.
    """
    is_later = is_later & (key == before)
    total = tl.where(key == before, total, 0.0) + row
    is_whole = (key != after) & ~is_later
    ends = (key >= 0) & (key < size) & ((key != after) | is_last)
    place = key.to(tl.int64) * H + columns
    tl.store(TABLE + place, total.to(TABLE.dtype.element_ty), mask=columns < tl.where(ends & is_whole, H, 0))
    place = tl.where(is_later, 0, H) + columns
    tl.store(PARTS + place, total, mask=columns < tl.where(ends & ~is_whole, H, 0))
    return total, is_later


@triton.jit(do_not_specialize=["tokens", "size"])
def add_runs_kernel(
    DX, KEYS, ORDER, TABLE, PARTS, tokens, size, H: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    """Rows of DX [T, H] in sorted ORDER, added up over runs of equal KEYS [T] → rows of TABLE [size, H].

    A program adds up a chunk of rows; PARTS [chunks, 2, H] takes the sums of runs that lie in more than one.
    """
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = chunk * CHUNK
    PARTS += chunk.to(tl.int64) * 2 * H
    before, key = key_at(KEYS, first - 1, tokens), key_at(KEYS, first, tokens)
    is_later = key == before
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(first, first + CHUNK, AHEAD):
        key1, key2, key3 = key_at(KEYS, at + 1, tokens), key_at(KEYS, at + 2, tokens), key_at(KEYS, at + 3, tokens)
        after = key_at(KEYS, at + 4, tokens)
        row0 = row_at(DX, ORDER, at, key, size, columns, H)
        row1 = row_at(DX, ORDER, at + 1, key1, size, columns, H)
        row2 = row_at(DX, ORDER, at + 2, key2, size, columns, H)
        row3 = row_at(DX, ORDER, at + 3, key3, size, columns, H)
        is_last = at + AHEAD == first + CHUNK
        total, is_later = add_row(total, is_later, row0, before, key, key1, False, TABLE, PARTS, size, columns, H)
        total, is_later = add_row(total, is_later, row1, key, key1, key2, False, TABLE, PARTS, size, columns, H)
        total, is_later = add_row(total, is_later, row2, key1, key2, key3, False, TABLE, PARTS, size, columns, H)
        total, is_later = add_row(total, is_later, row3, key2, key3, after, is_last, TABLE, PARTS, size, columns, H)
        before, key = key3, after


@triton.jit(do_not_specialize=["tokens", "size"])
def join_runs_kernel(
    KEYS, TABLE, PARTS, tokens, size, H: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The row of TABLE of the run that begins in a chunk and ends in a later one, from PARTS [chunks, 2, H]."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    next = (chunk + 1) * CHUNK
    key = key_at(KEYS, next - 1, tokens)
    goes_on = (key >= 0) & (key < size) & (key_at(KEYS, next, tokens) == key)
    if goes_on & (key_at(KEYS, chunk * CHUNK - 1, tokens) != key):
        total = tl.load(PARTS + (2 * chunk + 1).to(tl.int64) * H + columns, mask=columns < H, other=0.0)
        others, at = tl.zeros([CHUNKS, COLUMNS], tl.float32), chunk + 1
        while goes_on:
            chunks = at + tl.arange(0, CHUNKS)
            is_mine = key_at(KEYS, chunks * CHUNK, tokens) == key  # [CHUNKS]
            mask = is_mine[:, None] & (columns < H)[None, :]
            places = 2 * chunks.to(tl.int64)[:, None] * H + columns[None, :]
            others += tl.load(PARTS + places, mask=mask, other=0.0)
            goes_on = tl.sum(is_mine.to(tl.int32), 0) == CHUNKS
            at += CHUNKS
        total += tl.sum(others, 0)
        tl.store(TABLE + key.to(tl.int64) * H + columns, total.to(TABLE.dtype.element_ty), mask=columns < H)


def table_gradient(needed: bool, dx: Tensor, keys: Tensor | None, table: Tensor) -> Tensor:
    """dx [T, H] added up by keys [T], always in the same order → the gradient of a table; empty if not needed."""
    if not needed or keys is None:
        return table.new_empty(0)
    tokens, hidden = dx.shape
    out = torch.zeros_like(table, memory_format=torch.contiguous_format)
    if not tokens:
        return out
    ordered, order = keys.sort(stable=True)
    tiles = choose_run_tiles(hidden, table.dtype, card_of(dx.device))
    chunks = triton.cdiv(tokens, tiles.chunk)
    parts = dx.new_empty(chunks, 2, hidden)
    grid = chunks, triton.cdiv(hidden, tiles.columns)
    shape = {"tokens": tokens, "size": table.shape[0], "H": hidden, "COLUMNS": tiles.columns, "CHUNK": tiles.chunk}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    add_runs_kernel[grid](dx, ordered, order, out, parts, **shape, **options)
    join_runs_kernel[grid](ordered, out, parts, **shape, CHUNKS=tiles.parts, **options)
    return out


def keys_for(indices: Tensor | None, table: Tensor | None) -> Tensor | None:
    """Memory for the keys of a table's rows, of few bits where they suffice: fewer passes sort them."""
    if indices is None or table is None:
        return None
    return torch.empty_like(indices, dtype=torch.int16 if table.shape[0] < 2**15 else torch.int32)


def tables_of(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor,
) -> dict[str, object]:  # fmt: skip
    """What both row kernels take of indices and tables; without a table of types there are none."""
    types = None if type_table is None else types
    type_table = None if types is None else type_table
    return {
        "IDS": ids.contiguous(), "TYPES": contiguous(types), "POSITIONS": positions.contiguous(),
        "WORD_TABLE": words.contiguous(), "TYPE_TABLE": contiguous(type_table),
        "POSITION_TABLE": position_table.contiguous(), "word_rows": words.shape[0],
        "type_rows": 0 if type_table is None else type_table.shape[0], "position_rows": position_table.shape[0],
    }  # fmt: skip


def embed_layer_norm_reasons(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None,
    word_padding: int = -1, position_padding: int = -1, save: bool = False,
) -> list[str]:  # fmt: skip
    reasons = device_reasons(words.device) + hidden_reasons(words.shape[1])
    tables = {"words": words, "type_table": type_table, "position_table": position_table}
    return reasons + dtype_reasons(**tables, gamma=gamma, beta=beta)


def embed_layer_norm(
    ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float = 0.0, seed: Tensor | None = None,
    word_padding: int = -1, position_padding: int = -1, save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ids, types, positions [T]; tables [·, H] → y [T, H], mean, rstd [T] float32, the sum [T, H] if it is to be saved.

    A row with an index outside its table is NaN.
    """
    tokens, hidden = ids.shape[0], words.shape[1]
    y = words.new_empty(tokens, hidden)
    mean, rstd = (words.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    pre = words.new_empty(tokens, hidden) if save else None
    if tokens:
        tiles = choose_tiles(hidden, words.dtype, card_of(words.device))
        forward_kernel[(triton.cdiv(tokens, tiles.rows),)](
            **tables_of(ids, types, positions, words, type_table, position_table), GAMMA=gamma.contiguous(),
            BETA=beta.contiguous(), Y=y, MEAN=mean, RSTD=rstd, PRE=pre, tokens=tokens, eps=eps, H=hidden,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            **dropout_arguments(p, seed, SITE.value),
        )  # fmt: skip
    return y, mean, rstd, words.new_empty(0) if pre is None else pre


def embed_layer_norm_backward_reasons(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, p: float, seed: Tensor | None,
    word_padding: int, position_padding: int, needed: list[bool],
) -> list[str]:  # fmt: skip
    reasons = embed_layer_norm_reasons(ids, types, positions, words, type_table, position_table, gamma, gamma, 0.0)
    return reasons + dtype_reasons(grad=grad)


def embed_layer_norm_backward(
    grad: Tensor, ids: Tensor, types: Tensor | None, positions: Tensor, words: Tensor, type_table: Tensor | None,
    position_table: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, pre: Tensor, p: float, seed: Tensor | None,
    word_padding: int, position_padding: int, needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad [T, H] → the gradients of words, type_table, position_table, gamma, beta, bitwise the same again.

    An empty `pre` is gathered again. Rows with an index outside its table are left out.
    """
    tokens, hidden = grad.shape
    card = card_of(words.device)
    tiles = choose_backward_tiles(hidden, words.dtype, card)
    programs = programs_of(tokens, tiles, card)
    dx, parts = (words.new_empty(*shape, dtype=torch.float32) for shape in ((tokens, hidden), (2, programs, hidden)))
    tables = tables_of(ids, types, positions, words, type_table, position_table)
    word_keys, position_keys = keys_for(ids, words), keys_for(positions, position_table)
    type_keys = keys_for(types, type_table)
    if tokens:
        backward_kernel[(programs,)](
            grad.contiguous(), **tables, GAMMA=gamma.contiguous(), MEAN=mean.contiguous(), RSTD=rstd.contiguous(),
            PRE=pre.contiguous() if pre.dim() == 2 else None, DX=dx, WORD_KEYS=word_keys, TYPE_KEYS=type_keys,
            POSITION_KEYS=position_keys, PARTS=parts, tokens=tokens, word_padding=word_padding,
            position_padding=position_padding, H=hidden, ROWS=tiles.rows, COLUMNS=tiles.columns,
            num_warps=tiles.num_warps, num_stages=1, **dropout_arguments(p, seed, SITE.value),
        )  # fmt: skip
    dwords = table_gradient(needed[0], dx, word_keys, words)
    dtypes = table_gradient(needed[1], dx, type_keys, words if type_table is None else type_table)
    dpositions = table_gradient(needed[2], dx, position_keys, position_table)
    dgamma, dbeta = (add_parts(part, gamma, want) for part, want in zip(parts, needed[3:], strict=True))
    return dwords, dtypes, dpositions, dgamma, dbeta
