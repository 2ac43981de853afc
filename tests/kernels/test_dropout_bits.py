"""What tests/ops/test_dropout_bits.py leaves open: hidden dropout's decisions, large counters, planted errors."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastbert.kernels import dropout, dropout_bits
from fastbert.kernels.cards import Card

from tests.ops import philox

SEEDS = (0, -1, -(2**40) - 7, 2**33 + 5)


@triton.jit
def words_kernel(SEED, OUT, site, row, head):
    a, b, c, d = dropout.words_of(tl.load(SEED), site, row + tl.arange(0, 2), head, tl.zeros([2], tl.int32))
    tl.store(OUT + tl.arange(0, 2), a.to(tl.int32, bitcast=True))
    tl.store(OUT + 2 + tl.arange(0, 2), b.to(tl.int32, bitcast=True))
    tl.store(OUT + 4 + tl.arange(0, 2), c.to(tl.int32, bitcast=True))
    tl.store(OUT + 6 + tl.arange(0, 2), d.to(tl.int32, bitcast=True))


@triton.jit
def kept_kernel(SEED, OUT, site, limit, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.full([ROWS, COLUMNS], 1.0, tl.float32)
    x = dropout.kept(x, tl.load(SEED), site, rows, limit, scale, ROWS, COLUMNS)
    tl.store(OUT + rows[:, None] * COLUMNS + columns[None, :], x)


def hidden(seed, site, rows, columns, p):
    """Ones [rows, columns] after hidden dropout."""
    out = torch.empty(rows, columns)
    limit, scale = dropout.limit_of(p), dropout.keep_scale(p)
    kept_kernel[(1,)](torch.tensor(seed), out, dropout.as_int32(site), limit, scale, rows, columns)
    return out


def bits(seed, site, lengths, heads, p, longest=None):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths) if longest is None else longest
    found = dropout_bits.dropout_bits(torch.tensor(seed), site, cu_seqlens, sum(lengths), longest, heads, p)
    return found, philox.bits(seed, site, cu_seqlens, longest, heads, p)


@pytest.fixture
def large_tiles(monkeypatch):
    """In the interpreter a program takes as long whatever its size."""
    monkeypatch.setattr(dropout_bits, "choose_tiles", lambda card: dropout_bits.Tiles(256, 64, 4, 1))


def test_the_known_answer():
    out = torch.empty(8, dtype=torch.int32)
    words_kernel[(1,)](torch.tensor(0), out, 0, 0, 0)
    found = [f"{word % 2**32:08x}" for word in out[::2].tolist()]
    assert found == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


def test_the_ends_of_the_counter():
    """Rows, sites and heads whose upper bits are used, seeds of both signs."""
    for seed in (2**63 - 1, -(2**63)):
        out = torch.empty(8, dtype=torch.int32)
        words_kernel[(1,)](torch.tensor(seed), out, dropout.as_int32(2**32 - 4), 2**31 - 3, 65534)
        counter = tuple(np.array(c) for c in (0, 2**31 - 3, 2**32 - 4, 65534))
        expected = philox.philox(counter, (seed % 2**32, seed // 2**32 % 2**32))
        assert [word % 2**32 for word in out[::2].tolist()] == [int(word) for word in expected]


@pytest.mark.parametrize("p", [2**-17, 1e-4, 0.1, 0.5, 1 - 2**-16, 1.0])
def test_hidden_decisions(p):
    """Over 10^6 elements: a kept one is the scale, exactly; the others are 0."""
    for i, seed in enumerate(SEEDS):
        keep, scale = philox.hidden(seed, 4 * i + 2, 64, 1024, p)
        assert torch.equal(hidden(seed, 4 * i + 2, 64, 1024, p), keep.float() * scale)


def test_hidden_decisions_of_narrow_rows():
    for rows, columns in ((128, 8), (1, 16), (4, 256)):
        keep, scale = philox.hidden(5, 2**31, rows, columns, 0.3)
        assert torch.equal(hidden(5, 2**31, rows, columns, 0.3), keep.float() * np.float32(scale))


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_over_a_million_elements(seed, large_tiles):
    for site, p in ((0, 0.1), (4 * 23, 0.5)):
        found, expected = bits(seed, site, (512, 1, 0, 200), 3, p)
        assert torch.equal(found, expected)


def test_bits_by_the_tiles_of_a_card():
    """Lengths at words, counters and tiles of rows, more sequences than rows of a tile, many empty."""
    for lengths in ((31, 32, 33, 1, 8, 7, 9, 64), (0, 0, 130, 0), (1,) * 37 + (0,) * 9 + (2,)):
        found, expected = bits(3, 1, lengths, 2, 0.3)
        assert torch.equal(found, expected)


def test_rows_behind_the_last_sequence_keep_nothing():
    """T may be more than the sequences hold: a batch in a graph of fixed size."""
    found, seed = torch.tensor([0, 3, 5]).int(), torch.tensor(1)
    got = dropout_bits.dropout_bits(seed, 0, found, 9, 40, 2, 0.1)
    assert torch.equal(got[:, :5], dropout_bits.dropout_bits(seed, 0, found, 5, 40, 2, 0.1)) and not got[:, 5:].any()


def test_longer_sequences_than_the_longest_are_cut():
    found, _ = bits(2, 0, (70, 3), 1, 0.5)
    cut, _ = bits(2, 0, (70, 3), 1, 0.5, longest=40)
    assert torch.equal(cut, found[:, :, :2])


def test_nothing_to_do():
    assert bits(1, 0, (0, 0), 2, 0.1)[0].shape == (2, 0, 0)
    assert bits(1, 0, (0,), 2, 0.1, longest=64)[0].shape == (2, 0, 2)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_tiles(arch):
    tiles = dropout_bits.choose_tiles(Card(arch, 100))
    assert tiles.rows * tiles.counters % (32 * tiles.num_warps) == 0 and tiles.counters % 4 == 0


def test_refusals_in_words():
    arguments = torch.tensor(1), 0, torch.tensor([0, 3]).int(), 3, 3
    assert dropout_bits.dropout_bits_reasons(*arguments, 12, 0.1) == []
    assert dropout_bits.dropout_bits_reasons(*arguments, 65536, 0.1) == ["65536 heads are over 65535"]
    elsewhere = torch.empty((), dtype=torch.int64, device="meta")
    assert dropout_bits.dropout_bits_reasons(elsewhere, *arguments[1:], 12, 0.1) == ["device meta is not cuda"]


@triton.jit
def high_half_first(word, limit):
    least = limit.to(tl.uint32, bitcast=True)
    return word > least, (word << 16) > least


@triton.jit
def kept_above(word, limit):
    least = limit.to(tl.uint32, bitcast=True)
    return (word << 16) > least + 65536, word > least + 65536


@triton.jit
def halves_of_the_seed_swapped(seed, site, row, head, counter):
    return tl.philox((seed >> 32) | (seed << 32), counter, row, site, head, dropout.ROUNDS)


@triton.jit
def row_and_head_swapped(seed, site, row, head, counter):
    return tl.philox(seed, counter, head + row * 0, site, row, dropout.ROUNDS)


@triton.jit
def endless(rows, CU_SEQLENS, batch, steps):
    return rows * 0 + 2**20


PLANTED = {
    "10 rounds": ((dropout, "ROUNDS", tl.constexpr(10)),),
    "the high half first": ((dropout, "is_kept", high_half_first), (dropout_bits, "is_kept", high_half_first)),
    "u16 > thr": ((dropout, "is_kept", kept_above), (dropout_bits, "is_kept", kept_above)),
    "the seed's halves": tuple((m, "words_of", halves_of_the_seed_swapped) for m in (dropout, dropout_bits)),
    "row for head": tuple((m, "words_of", row_and_head_swapped) for m in (dropout, dropout_bits)),
    "keys past the end": ((dropout_bits, "lengths_of", endless),),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_caught(error, monkeypatch, large_tiles):
    for module, name, planted in PLANTED[error]:
        monkeypatch.setattr(module, name, planted)
    seed, p = SEEDS[2], 0.1
    found, expected = bits(seed, 4, (512, 33), 2, p)
    assert not torch.equal(found, expected)
    if error not in ("keys past the end", "u16 > thr"):  # one element in 65536 stands at the threshold
        keep, scale = philox.hidden(seed, 4, 64, 1024, p)
        assert not torch.equal(hidden(seed, 4, 64, 1024, p), keep.float() * np.float32(scale))
