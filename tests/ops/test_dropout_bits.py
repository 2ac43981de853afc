"""Dropout: what is kept, by the numpy twin of its definition, and what the ops that drop hidden states do with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import stock
from fastbert import ops
from fastbert.ops import dropout
from tests.ops import philox
from tests.ops.cases import ADD_LAYER_NORM, ATTENTION, CASES, DEVICES, DTYPES, EMBED_LAYER_NORM, NO_TOKENS, cast
from tests.ops.common import EDGES, Backend, backends_of, names_here
from tests.ops.gradients import gradients, upstream

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 123456789 * 2**32 + 5)
BACKENDS = [Backend(name, device) for device in DEVICES for name in names_here(ops.dropout_bits, device)]
backends = pytest.mark.parametrize("backend", BACKENDS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
HIDDEN = {"add_layer_norm": ADD_LAYER_NORM, "embed_layer_norm": EMBED_LAYER_NORM}


def bits(backend, seed, site, lengths, longest, heads, p):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    seed = torch.tensor(seed, device=backend.device)
    with ops.use_backend(backend.name):
        found = ops.dropout_bits(seed, site, cu_seqlens.to(backend.device), sum(lengths), longest, heads, p).cpu()
    expected = philox.bits(int(seed), site, cu_seqlens, longest, heads, p)
    assert (found.dtype, found.shape) == (torch.int32, expected.shape)
    return found, expected


def unpacked(bits):
    """int32 [N, T, W] → bool [N, T, 32·W]."""
    return torch.from_numpy(np.unpackbits(bits.numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool))


def test_the_known_answer():
    """Salmon's generator at 7 rounds, counter and key 0: in numpy and in torch."""
    answer = ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    zero = torch.zeros((), dtype=torch.int64)
    assert [f"{int(w):08x}" for w in philox.philox((np.array(0),) * 4, (0, 0))] == answer
    assert [f"{int(w):08x}" for w in dropout.philox(zero, zero, 0, zero, zero)] == answer


@backends
@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_the_definitions(seed, backend):
    """Over 1.2 million elements a seed; rows and keys at the edges of words and counters; several heads and sites."""
    for site, heads, lengths, p in (
        (0, 4, (511, 1, 33, 0, 7, 32, 31), 0.1),
        (4 * 23 + 2, 2, (64, 8, 9), 0.5),
        (2**31, 1, (5,), 0.9),
    ):
        found, expected = bits(backend, seed, site, lengths, max(lengths), heads, p)
        assert torch.equal(found, expected)


@backends
@pytest.mark.parametrize("case", [*CASES, NO_TOKENS], ids=str)
def test_bits_of_every_case(case, backend):
    found, expected = bits(backend, 7, 4, case.lengths, max(case.lengths), case.heads, 0.1)
    assert torch.equal(found, expected)


@backends
@pytest.mark.parametrize("p", [0.0, 2**-18, 2**-17, 1e-4, 0.1, 0.5, 1 - 2**-17, 1.0])
def test_every_probability(p, backend):
    """p is told by 16 bits: below 2^-17 nothing is dropped, from 1 - 2^-17 on everything."""
    lengths = (40, 3, 100)
    found, expected = bits(backend, 3, 1, lengths, 100, 2, p)
    assert torch.equal(found, expected)
    inside = torch.arange(128) < torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))[:, None]
    kept = unpacked(found)
    assert not kept[:, ~inside].any()
    if p < 2**-17:
        assert kept[:, inside].all()
    if p >= 1 - 2**-17:
        assert not kept.any()


@backends
def test_bits_depend_on_row_and_column_alone(backend):
    """Not on where a sequence ends, on what follows it, nor on how far max_seqlen reaches."""
    whole, _ = bits(backend, 5, 0, (90, 70), 90, 2, 0.3)
    cut, _ = bits(backend, 5, 0, (90, 30, 40), 90, 2, 0.3)
    far, _ = bits(backend, 5, 0, (90, 70), 512, 2, 0.3)
    assert torch.equal(whole[:, :90], cut[:, :90])  # the first sequence, others behind it
    assert torch.equal(unpacked(whole)[:, 90:120, :30], unpacked(cut)[:, 90:120, :30])  # the same rows, shorter
    assert torch.equal(whole, far[:, :, :3]) and not far[:, :, 3:].any()


@backends
def test_the_rate_and_independence(backend):
    """What is kept is 1 - p within 5 standard deviations; sites, heads and seeds agree as often as chance has it."""
    p, n = 0.1, 512 * 512
    count = 2 * n
    kept, other, moved = (
        unpacked(bits(backend, seed, site, (512,), 512, 2, p)[0]) for seed, site in ((1, 0), (1, 4), (2, 0))
    )
    expected = 1 - math.floor(p * 65536 + 0.5) / 65536
    for sample in (kept, other, moved):
        assert abs(int(sample.sum()) - count * expected) < 5 * math.sqrt(count * p * (1 - p))
    agree = expected**2 + (1 - expected) ** 2
    for first, second in ((kept, other), (kept, moved), (kept[:1], kept[1:]), (kept[:, 1:], kept[:, :-1])):
        same, size = int((first == second).sum()), first.numel()
        assert abs(same - size * agree) < 5 * math.sqrt(size * agree * (1 - agree))


@backends
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 131, 768])
def test_hidden_states_keep_what_the_definition_says(columns, backend):
    rows, seed = 1500, torch.tensor(SEEDS[-1], device=backend.device)
    for p in (0.1, 0.5, 1.0, 2**-18):
        keep, scale = philox.hidden(SEEDS[-1], 6, rows, columns, p)
        assert torch.equal(dropout.keep_rows(seed, 6, rows, columns, p).cpu(), keep)
        assert dropout.keep_scale(p) == scale


@pytest.mark.parametrize("p", [0.0, 2**-18, 0.1, 1 / 3, 0.5, 0.999, 1 - 2**-17, 1.0])
def test_threshold_and_scale(p):
    kept = 65536 - math.floor(p * 65536 + 0.5)
    assert dropout.threshold(p) == 65536 - kept
    assert dropout.keep_scale(p) == (65536 / kept if kept else 0.0)


def hidden_call(name, dtype, p, site=2):
    """The op's spec, and arguments with dropout."""
    spec = HIDDEN[name]
    exact = next(iter(spec.inputs(EDGES, dtype)))[1]
    return spec, cast((*exact, p, torch.tensor(11), *((site,) if name == "add_layer_norm" else ())), dtype)


@dtypes
@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_everything_dropped(name, backend, dtype):
    """p = 1: zeros in place of what is dropped, and no gradient. A p that 16 bits cannot tell from 0 drops nothing."""
    spec, arguments = hidden_call(name, dtype, 1.0)
    arguments = cast(arguments, dtype, backend.device)
    y, *_ = backend(spec, arguments)
    found = gradients(spec, arguments, upstream(spec, arguments, dtype).to(backend.device), backend)
    if name == "add_layer_norm":
        x, _, residual, *rest = arguments
        assert torch.equal(y, backend(spec, (x * 0, None, residual, *rest[:3]))[0])
        assert not found["x_grad"].any() and not found["bias_grad"].any() and found["residual_grad"].isfinite().all()
    else:
        assert not y.any() and not any(g.any() for g in found.values())
    _, tiny = hidden_call(name, dtype, 2**-18)
    tiny = cast(tiny, dtype, backend.device)
    plain = tiny[: spec.op.arguments().index("p")]
    assert all(torch.equal(a, b) for a, b in zip(backend(spec, tiny), backend(spec, plain), strict=True))


@dtypes
@backends
def test_the_same_is_dropped_in_forward_and_backward(backend, dtype):
    """The gradient of x is zero exactly where x did not count, and nowhere else."""
    spec, arguments = hidden_call("add_layer_norm", dtype, 0.5)
    arguments = cast(arguments, dtype, backend.device)
    found = gradients(spec, arguments, upstream(spec, arguments, dtype).to(backend.device), backend)
    keep, scale = philox.hidden(11, 2, *arguments[0].shape, 0.5)
    assert scale == 2.0
    assert torch.equal(found["x_grad"].cpu() != 0, keep & (found["residual_grad"].cpu() != 0))
    assert torch.equal(found["x_grad"].cpu()[keep], 2 * found["residual_grad"].cpu()[keep])


@dtypes
@pytest.mark.parametrize("backend", list(backends_of(ATTENTION, DEVICES)), ids=str)
def test_attention_with_everything_or_nothing_dropped(backend, dtype, parity):
    """p = 1: zeros, and no gradient. p below 2^-17: what the bits say is everything."""
    qkv, cu_seqlens, longest, scale = next(iter(ATTENTION.inputs(EDGES, dtype)))[1]
    for p in (1.0, 2**-18):
        kept = philox.bits(1, 0, cu_seqlens, longest, EDGES.heads, p)
        exact = (qkv, cu_seqlens, longest, scale, kept, p)
        arguments = cast(exact, dtype, backend.device)
        grad = upstream(ATTENTION, arguments, dtype).to(backend.device)
        out, found = backend(ATTENTION, arguments)[0], gradients(ATTENTION, arguments, grad, backend)["qkv_grad"]
        if p == 1.0:
            assert not out.any() and not found.any()
            continue
        rounded = cast(exact, dtype)
        ref, base = (
            f(*cast(rounded, d)[:4]) for f, d in ((ATTENTION.reference, torch.float64), (stock.attention, dtype))
        )
        parity(out.cpu(), ref[0], base, name=f"attention/{backend}/out/nothing dropped")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p": 1.5}, "p = 1.5 is no probability"),
        ({"p": -0.1}, "p = -0.1 is no probability"),
        ({"seed": torch.tensor(1.0)}, r"seed is torch.float32 \[\], expected one int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed is torch.int64 \[2\], expected one int64"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens is torch.int64, not int32"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    arguments = {
        "seed": torch.tensor(1), "site": 0, "cu_seqlens": torch.tensor([0, 3]).int(), "tokens": 3, "max_seqlen": 3,
        "heads": 2, "p": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        ops.dropout_bits(**(arguments | changes))


@pytest.mark.parametrize("name", HIDDEN)
def test_a_seed_without_p_is_refused_and_p_without_a_seed(name):
    spec, arguments = hidden_call(name, torch.float32, 0.1)
    place = spec.op.arguments().index("p")
    for p, seed, words in ((0.1, None, "p = 0.1 and seed missing"), (0.0, torch.tensor(1), "p = 0.0 and seed given")):
        with pytest.raises(ValueError, match=words):
            spec.op(*arguments[:place], p, seed)


def test_there_is_nothing_to_differentiate():
    seed, cu_seqlens = torch.tensor(1), torch.tensor([0, 3], dtype=torch.int32)
    assert not torch.ops.fastbert.dropout_bits(seed, 0, cu_seqlens, 3, 3, 2, 0.1).requires_grad


@pytest.mark.parametrize("lengths", [(3, 0, 40), (0, 0)])
def test_opcheck(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = (torch.tensor(5), 2, cu_seqlens, sum(lengths), max(lengths), 2, 0.1)
    torch.library.opcheck(ops.dropout_bits.overload, arguments)
