"""CPU attention by every instruction set: lengths and head dims around its tiles, threads, neighbours, memory."""

from __future__ import annotations

import ctypes
import functools
import platform

import pytest
import torch

from fastbert import ops
from fastbert.ops import reference
from fastbert.ops.sample_calls import backward_arguments
from tests.ops import philox
from tests.ops.cases import ATTENTION, DTYPES, SEED, cast, normal
from tests.ops.common import Backend, as_tuple
from tests.ops.gradients import gradients, ref_and_base, upstream
from tests.ops.test_isas import isa, library  # noqa: F401 - fixtures

CPU = Backend("cpu", "cpu")
DIMS = (1, 3, 8, 16, 24, 32, 33, 48, 64, 72, 80, 96, 128, 160)  # around vectors of 4, 8 and 16 numbers, and their pairs
SHORT = (0, 1, 2, 15, 16, 17, 31, 32, 33, 7, 8, 9)  # around a block of queries of every instruction set
MIDDLE = (63, 64, 65, 127, 128, 129)  # around a chunk of keys
LONG = (255, 256, 257, 511, 512, 513)
MOST = (2000,)
SLOW_DTYPES = (*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.slow))  # as bfloat16 where it is widened
CALLS = [
    *((SHORT, dim, p) for dim in DIMS for p in (0.0, 0.3)),
    *((MIDDLE, dim, p) for dim in (3, 32, 64) for p in (0.0, 0.3)),
    *((LONG, dim, 0.0) for dim in (33, 64)), (LONG, 32, 0.3), (MOST, 32, 0.0), (MOST, 8, 0.3),
]  # fmt: skip


def call(lengths, dim, dtype, p=0.0, heads=2, peak=1.0, order=False):
    """The op's arguments; peak: what queries are multiplied with; order: that of the lengths, longest first."""
    tokens, longest = sum(lengths), max(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = normal(tokens, 3, heads, dim, like=f"cpu {lengths} {dim}")
    qkv[:, 0] *= peak
    bits = philox.bits(SEED, 0, cu_seqlens, longest, heads, p) if p else None
    work = None, ()
    if order:
        classes = [sum(sum(n > most for most in ops.LENGTH_CLASSES) == i for n in lengths) for i in range(5)]
        work = torch.argsort(torch.tensor(lengths), descending=True, stable=True).int(), classes
    return qkv.to(dtype), cu_seqlens, longest, dim**-0.5, bits, p, *work


def run(arguments, grad):
    """out, lse, and of a gradient of out those of qkv and of a bias; all by the kernels for CPUs."""
    found = ATTENTION.op.backends["cpu"].run(*arguments)
    *rest, _ = backward_arguments(ATTENTION.op, arguments, found, grad)
    return dict(zip(("out", "lse", "dqkv", "dbias"), (*found, *backward(rest)), strict=True))


def backward(rest):
    return ATTENTION.op.gradient.op.backends["cpu"].run(*rest, [True, True])


def gradient_for(arguments):
    return upstream(ATTENTION, arguments, arguments[0].dtype)


@functools.lru_cache(maxsize=256)
def expected(lengths, dim, p, peak, dtype):
    """The call, its upstream gradient, and what the rule needs of it: the same for every instruction set."""
    arguments = call(lengths, dim, dtype, p, heads=2 if max(lengths) < 255 else 1, peak=peak)
    grad, ref_gradients, base_gradients = ref_and_base(ATTENTION, arguments, gradient_for(arguments))
    refs = as_tuple(ATTENTION.reference(*cast(arguments, torch.float64)))
    bases = as_tuple(ATTENTION.stock(*arguments))
    return arguments, grad, refs, bases, ref_gradients["qkv_grad"], base_gradients["qkv_grad"]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("lengths", "dim", "p"), CALLS, ids=lambda x: str(max(x)) if isinstance(x, tuple) else str(x))
@pytest.mark.parametrize("dtype", SLOW_DTYPES, ids=str)
def test_parity_around_the_tiles(lengths, dim, p, dtype, parity):
    for peak in (1.0, 8.0):
        arguments, grad, refs, bases, ref, base = expected(lengths, dim, p, peak, dtype)
        for i, ours in enumerate(CPU(ATTENTION, arguments)):
            parity(ours, refs[i], bases[i], name=f"attention/cpu/{ATTENTION.outputs[i]}/tiles")
        ours = gradients(ATTENTION, arguments, grad, CPU)["qkv_grad"]
        parity(ours, ref, base, name="attention_backward/cpu/qkv_grad/tiles")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("lengths", [(600, 1, 0, 33, 129), (1100,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(lengths, dtype):
    """More threads make shares of fewer queries."""
    arguments = call(lengths, 32, dtype, 0.1, heads=3)
    grad, before, found = gradient_for(arguments), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(arguments, grad))
    finally:
        torch.set_num_threads(before)
    for name in ("out", "lse", "dqkv"):
        assert torch.equal(found[0][name], found[1][name]) and torch.equal(found[0][name], found[2][name]), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_alone_has_the_same_bits(dtype):
    lengths = (40, 0, 17, 130, 1)
    arguments = call(lengths, 33, dtype, 0.1, order=True)
    grad, bits = gradient_for(arguments), arguments[4]
    together, start = run(arguments, grad), 0
    for length in lengths:
        rows = slice(start, start + length)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        kept = bits[:, rows, : -(-length // 32)]
        alone = run((arguments[0][rows], cu_seqlens, length, arguments[3], kept, 0.1, None, ()), grad[rows])
        for name, rows_of in (("out", together["out"][rows]), ("dqkv", together["dqkv"][rows])):
            assert torch.equal(alone[name], rows_of), (length, name)
        assert torch.equal(alone["lse"], together["lse"][:, rows])
        start += length


@pytest.mark.usefixtures("isa")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("dim", [3, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_memory_held_before_does_not_matter(dtype, dim):
    arguments = call((33, 1, 129, 16), dim, dtype, 0.1)
    grad, found = gradient_for(arguments), []
    perturb = functools.partial(ctypes.CDLL(None).mallopt, -6)  # M_PERTURB: memory is filled with 255 - its argument
    try:
        for fill in (0x7F, 0xFE, 0x01):
            perturb(255 - fill)
            found.append(run(arguments, grad))
    finally:
        perturb(0)
    for name, first in found[0].items():
        assert first.isfinite().all() and torch.equal(first, found[1][name]) and torch.equal(first, found[2][name])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_the_formula_takes_it(part, value, dtype):
    """Key 130 stands in the second chunk of the middle sequence, in head 1."""
    arguments = call((20, 140, 5), 33, dtype)
    grad = gradient_for(arguments)
    before = run(arguments, grad)
    arguments[0][150, part, 1, 7] = value
    out, lse = ATTENTION.op.backends["cpu"].run(*arguments)
    dqkv, _ = backward(backward_arguments(ATTENTION.op, arguments, (out, lse), grad)[:-1])
    ref, _ = reference.attention(*cast(arguments, torch.float64))
    assert torch.equal(out.isfinite(), ref.isfinite()) and torch.equal(out.isnan(), ref.isnan())
    torch.testing.assert_close(out.double(), ref, rtol=2e-2, atol=2e-2, equal_nan=True)
    others = torch.ones(165, dtype=torch.bool)
    others[20:160] = False
    assert torch.equal(out[others], before["out"][others]) and torch.equal(lse[:, others], before["lse"][:, others])
    assert torch.equal(dqkv[others], before["dqkv"][others])
    assert torch.equal(dqkv[:, :, 0], before["dqkv"][:, :, 0]), "the other head"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, 3e4], ids=str)
def test_large_scores(size, dtype):
    """Scores up to 9e8: each row takes one key's value, the chunks behind it are multiplied with 0."""
    qkv, *rest = call((300,), 64, dtype, heads=1)
    qkv[:, :2] *= size if dtype != torch.float16 else 100
    arguments = qkv, *rest
    out, lse = ATTENTION.op.backends["cpu"].run(*arguments)
    ref, ref_lse = reference.attention(*cast(arguments, torch.float64))
    torch.testing.assert_close(out.double(), ref, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33, 64])
def test_strides_are_read_in_place(dim, dtype):
    """Heads before q, k and v in memory, numbers between the rows: the bits of the contiguous copy's."""
    qkv, *rest = call((17, 40), dim, dtype)
    wide = torch.full((2, 57, 3, dim + 5), torch.nan, dtype=dtype)  # [N, T, 3, D + 5]
    wide[..., :dim] = qkv.permute(2, 0, 1, 3)
    view = wide[..., :dim].permute(1, 2, 0, 3)
    grad = gradient_for((qkv, *rest))
    for name, ours in run((view, *rest), grad).items():
        assert torch.equal(ours, run((qkv, *rest), grad)[name]), name


@pytest.mark.usefixtures("isa")
def test_all_is_dropped_at_p_1():
    qkv, cu_seqlens, longest, scale, *_ = call((5, 40), 16, torch.float32)
    arguments = qkv, cu_seqlens, longest, scale, torch.zeros(2, 45, 2, dtype=torch.int32), 1.0, None, ()
    found = run(arguments, gradient_for(arguments))
    assert not found["out"].any() and not found["dqkv"].any() and found["lse"].isfinite().all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cu_seqlens": [0, 4, 3]}, "cu_seqlens do not ascend from 0 to T"),
        ({"cu_seqlens": [0, 2, 4]}, "cu_seqlens do not ascend from 0 to T"),
        ({"cu_seqlens": [-1, 2, 3]}, "cu_seqlens do not ascend from 0 to T"),
        ({"order": [0, 2]}, "order holds no sequences"),
        ({"keep_bits": torch.ones(2, 3, 0, dtype=torch.int32), "p": 0.5, "max_seqlen": 0}, "keep_bits are too narrow"),
        (
            {
                "qkv": torch.ones(34, 3, 2, 8),
                "cu_seqlens": [0, 1, 34],
                "keep_bits": torch.ones(2, 34, 1, dtype=torch.int32),
                "p": 0.5,
            },
            "keep_bits are too narrow",
        ),
    ],
)
def test_what_the_kernels_would_read_beyond(changes, words):
    given = {"qkv": torch.ones(3, 3, 2, 8), "cu_seqlens": [0, 1, 3], "max_seqlen": 3, "scale": 1.0, "keep_bits": None}
    given |= {"p": 0.0, "order": [1, 0], "classes": [2, 0, 0, 0, 0]} | changes
    given |= {name: torch.tensor(given[name], dtype=torch.int32) for name in ("cu_seqlens", "order")}
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=words):
        ops.attention(*given.values())
    tokens = given["qkv"].shape[0]
    rest = given["qkv"], torch.ones(tokens, 2, 8), torch.ones(2, tokens), *list(given.values())[1:]
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=words):
        ATTENTION.op.gradient.op(torch.ones(tokens, 2, 8), *rest, [True, True])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("qkv", "scale", "words"),
    [
        (torch.ones(3, 3, 2, 8).double(), 1.0, "qkv is torch.float64: it takes float32, float16 and bfloat16"),
        (torch.ones(3, 3, 2, 0), 1.0, "head_dim is 0"),
        (torch.ones(3, 3, 2, 8), 0.0, "scale 0.0 is not over 0"),
    ],
)
def test_what_is_not_taken_is_refused_in_words(qkv, scale, words):
    with ops.use_backend("cpu"), pytest.raises(ops.BackendRefused, match=words):
        ops.attention(qkv, torch.tensor([0, 3], dtype=torch.int32), 3, scale)
