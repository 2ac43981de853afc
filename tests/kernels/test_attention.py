"""What tests/ops/test_attention.py leaves open: tiles of every shape, classes of lengths, planted errors."""

import importlib.util
import inspect
import itertools
import sys

import pytest
import torch
from fastbert.kernels import attention as kernels
from fastbert.kernels import cards

from benchmarks import compiled
from fastbert import ops
from fastbert.parity import judge
from tests.ops import philox
from tests.ops.attention_calls import call, classes_of
from tests.ops.cases import DTYPES

ARCHES = (80, 86, 89, 90, 100, 120)
# one below, at and above the tiles of 16, 64, 128 and 256, the longest of the last class but one, and one more
LENGTHS = (1, 64, 15, 129, 16, 17, 0, 63, 65, 127, 128)
LONG = (255, 512, 256, 513, 257)
KINDS = ("", "peaked", "dropout")
NEAR = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def run(arguments, grad, order=None, classes=(), module=kernels):
    out, lse = module.attention(*arguments, order, classes)
    qkv, *rest = arguments
    dqkv, dbias = module.attention_backward(grad, qkv, out, lse, *rest, order, classes, [True, True])
    return {"out": out, "lse": lse, "dqkv": dqkv, "dbias": dbias}


def judged(parity, lengths, heads, dim, dtype, kind, card=None):
    """Runs a batch by its length classes and judges it."""
    arguments, grad, ref, base = call(lengths, heads, dim, dtype, kind)
    with cards.imitate(card or cards.INTERPRETED):
        found = run(arguments, grad, *classes_of(lengths))
    for name, ours in found.items():
        parity(ours, ref[name], base[name], name=f"attention/kernels/{name}/{kind}")


# Tiles


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_every_shape(arch, dtype):
    """Powers of two of at least 16; a whole sequence where a kernel asks for it; within the card's shared memory."""
    card, size = cards.Card(arch, 132), dtype.itemsize
    for dim in range(1, 129):
        padded = kernels.padded_dim(dim)
        assert padded >= max(dim, 16) and is_power_of_2(padded) and padded < 2 * max(dim, 9)
        lengths, precisions = (1, 17, 64, 65, 128, 200, 256, 257, 512, 513, 8192), ("ieee", "tf32")
        for longest, precision in itertools.product(lengths, precisions):
            tiles = kernels.choose_tiles(longest, dim, dtype, card, precision)
            assert not tiles.whole or tiles.block_n >= longest
            check(tiles, card, (tiles.block_m + 2 * tiles.num_stages * tiles.block_n) * padded * size)
            chosen = kernels.choose_backward_tiles(longest, dim, dtype, card, precision)
            assert (chosen.one_pass is None) == (chosen.dq is not None) and (chosen.dq is None) == (chosen.dkdv is None)
            if one := chosen.one_pass:
                assert one.block_m >= longest
            for tiles in filter(None, (chosen.one_pass, chosen.dq)):
                check(tiles, card, 2 * (tiles.block_m + tiles.num_stages * tiles.block_n) * padded * size)
            if tiles := chosen.dkdv:
                rows = 2 * (tiles.block_n + tiles.num_stages * tiles.block_m) * padded
                check(tiles, card, (rows + 2 * tiles.block_m * tiles.block_n) * size)


def check(tiles, card, operands):
    """operands: bytes of those matrices that stand in shared memory."""
    assert is_power_of_2(tiles.block_m) and is_power_of_2(tiles.block_n) and is_power_of_2(tiles.num_warps)
    assert tiles.block_m >= 16 and tiles.block_n >= 32  # a word of keep bits is 32 keys
    assert (tiles.registers or 0) * 32 * tiles.num_warps <= 65536
    assert operands <= card.shared_memory


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qkv": torch.ones(3, 3, 2, 129)}, ["head_dim 129 is not in 1 to 128"]),
        ({"qkv": torch.ones(3, 3, 2, 8).double()}, ["qkv is torch.float64: it takes float32, float16 and bfloat16"]),
        ({"scale": -1.0}, ["scale -1.0 is not over 0"]),
        ({"qkv": torch.ones(3, 3, 2, 0), "scale": 0.0}, ["head_dim 0 is not in 1 to 128", "scale 0.0 is not over 0"]),
        ({}, []),
    ],
)
def test_refusals_in_words(changes, words):
    qkv, cu_seqlens = torch.ones(3, 3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    arguments = {"qkv": qkv, "cu_seqlens": cu_seqlens, "max_seqlen": 3, "scale": 1.0} | changes
    assert kernels.attention_reasons(**arguments) == words
    out = torch.ones(3, 2, 8).to(arguments["qkv"].dtype)
    rest = {"grad": out, "out": out, "lse": torch.ones(2, 3), "keep_bits": None, "p": 0.0}
    rest |= {"order": None, "classes": [], "needed": [True, True]}
    assert kernels.attention_backward_reasons(**arguments, **rest) == words
    mixed = kernels.attention_backward_reasons(**arguments, **rest | {"grad": out.half()})
    assert mixed == [*words, f"grad is torch.float16, qkv is {arguments['qkv'].dtype}"]


# Launches


def test_launches_longest_first():
    assert list(kernels.launches(7, 600, [3, 0, 1, 0, 3])) == [(0, 3, 600), (3, 1, 256), (4, 3, 64)]
    assert list(kernels.launches(2, 40, [2, 0, 0, 0, 0])) == [(0, 2, 40)]
    assert list(kernels.launches(7, 600, [])) == [(0, 7, 600)]
    assert kernels.CLASSES == ops.LENGTH_CLASSES


def test_keep_scale_is_the_definitions():
    for p in (0.0, 0.1, 0.5, 1 - 2**-16, 1 - 2**-18, 1.0):
        assert kernels.keep_scale(p) == philox.scale(p)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_a_class_alone_gives_what_one_launch_gives(dtype, parity):
    """In batches without an order the longest sequence decides: other kernels, the same numbers."""
    lengths = (65, 17, 129, 0, 3)
    arguments, grad, ref, base = call(lengths, 1, 16, dtype, "dropout")
    together, by_class = run(arguments, grad), run(arguments, grad, *classes_of(lengths))
    for name in together:
        parity(together[name], ref[name], base[name], name=f"attention/kernels/{name}/one launch")
        parity(by_class[name], ref[name], base[name], name=f"attention/kernels/{name}/classes")
    whole = classes_of(lengths)[0], [0, 0, 5, 0, 0]  # all of them in the class of 256: the launch without an order
    for name, ours in run(arguments, grad, *whole).items():
        assert torch.equal(ours, together[name])


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_a_sequence_alone_is_bitwise_what_it_is_in_a_batch(dtype):
    """By its length class, whatever its neighbours are."""
    lengths = (65, 17, 129)
    (qkv, cu_seqlens, _, scale, *_), grad, *_ = call(lengths, 1, 16, dtype)
    together, offsets = run((qkv, cu_seqlens, 129, scale, None, 0.0), grad, *classes_of(lengths)), cu_seqlens.tolist()
    for start, end in itertools.pairwise(offsets):
        length = end - start
        arguments = qkv[start:end], torch.tensor([0, length], dtype=torch.int32), length, scale, None, 0.0
        alone = run(arguments, grad[start:end], *classes_of((length,)))
        for name in ("out", "dqkv"):
            assert torch.equal(alone[name], together[name][start:end])
        assert torch.equal(alone["lse"], together["lse"][:, start:end])


# Numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_lengths_around_tiles(dtype, kind, parity):
    judged(parity, LENGTHS, 1, 32, dtype, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_lengths_around_tiles(dtype, kind, parity):
    judged(parity, LONG, 1, 64, dtype, kind)


@pytest.mark.parametrize("dim", [3, 8, 33, 80, 96, 128])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_head_dims(dtype, dim, parity):
    """Narrow, what no vector divides, what is padded by half, the widest; every kernel."""
    judged(
        parity, (17, 70, 0, 131) if dtype.itemsize == 2 else (17, 0, 70), 2, dim, dtype, "dropout" if dim % 2 else ""
    )


@pytest.mark.parametrize("arch", [90, 120])
def test_tiles_of_other_cards(arch, parity):
    judged(parity, (150, 70, 9), 1, 64, torch.bfloat16, "dropout", cards.Card(arch, 132))


def test_tf32_where_torch_allows_it():
    """Errors of TF32's size, by tiles of its own."""
    arguments, grad, ref, _ = call((17, 70), 1, 32, torch.float32)
    exact = run(arguments, grad, *classes_of((17, 70)))
    with compiled.settings(tf32=True):
        found = run(arguments, grad, *classes_of((17, 70)))
    for name in found:
        errors = [(x[name].double() - ref[name]).norm() / ref[name].norm() for x in (exact, found)]
        assert errors[0] < 1e-6 and 1e-5 < errors[1] < 1e-2


def test_all_are_dropped():
    arguments, grad, *_ = call((20, 3), 2, 16, torch.float32)
    bits = torch.zeros(2, 23, 1, dtype=torch.int32)
    found = run((*arguments[:4], bits, 1.0), grad, *classes_of((20, 3)))
    assert not found["out"].any() and not found["dqkv"].any() and found["lse"].isfinite().all()


def test_empty_batches():
    for lengths in ((), (0, 0)):
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        found = run((torch.empty(0, 3, 2, 16), cu_seqlens, 0, 1.0, None, 0.0), torch.empty(0, 2, 16))
        assert [list(x.shape) for x in found.values()] == [[0, 2, 16], [2, 0], [0, 3, 2, 16], [3, 2, 16]]
    assert not found["dbias"].any()


# Planted errors: (what stands in the file, what is put there), each in every place where it stands

PLANTED = {
    "no key mask": ("return keys % 8 < left - keys // 8 * 8", "return keys >= 0"),
    "key mask one too far": ("return keys % 8 < left - keys // 8 * 8", "return keys <= left"),
    "delta missing": ("tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)", "tl.sum(out.to(tl.float32) * 0.0, 1)"),
    "keep bits of the next word": ("words = tl.load(bits + rows * width,", "words = tl.load(bits + rows * width + 1,"),
    "keep bits of the first row": ("words = tl.load(bits + rows * width,", "words = tl.load(bits + (rows | 1) * 0,"),
    "a byte's keep bits for all": ("keys % 32 // 8 * 8", "keys * 0"),
    "later words of a tile": ("tl.where(keys // 32 == i, more, words)", "words"),
    "scale missing in dq": ("dquery * scale", "dquery"),
    "scale missing in dk": ("dkey * scale", "dkey"),
    "dropout's scale missing in dv": ("dvalue * keep_scale", "dvalue"),
    "what is dropped missing in the sum": ("probabilities = tl.where(keep, probabilities, 0.0)\n        out",
                                           "probabilities = tl.where(keep, probabilities, 0.0)\n        total = total"
                                           " - tl.sum(tl.where(keep, 0.0, 0.01), 1)\n        out"),
    "rescaling missing": ("out * shrink[:, None]", "out"),
    "lse of unscaled scores": ("most * scale + tl.log(total)", "most + tl.log(total)"),
    "lse in base 2": ("tl.log(total)", "tl.log2(total)"),
    "dq's sums not scaled": ("head, dquery * scale", "head, dquery"),
    "sums of the first tile for all": ("heads * blocks + i // BLOCK_M", "heads * blocks"),
    "sums of dv where those of dq are": ("place + 1", "place"),
    "head 0 for all": ("head = pair % heads", "head = pair % 1"),
    "the order is not read": ("sequence = tl.load(ORDER + place)", "sequence = place"),
}  # fmt: skip


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """(what stands there, what is put there) → the module with it."""

    def plant(old, new):
        source = inspect.getsource(kernels)
        assert old in source
        file = tmp_path / "planted.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("fastbert.kernels.planted", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return plant


SEEN_WITHOUT_DROPOUT = (  # where the kernels sum what they make
    "dq's sums not scaled", "sums of the first tile for all", "sums of dv where those of dq are",
)  # fmt: skip


def worst(module, kind="dropout"):
    lengths = (40, 129, 100, 17)  # every kernel
    arguments, grad, ref, base = call(lengths, 2, 32, torch.bfloat16, kind)
    found = run(arguments, grad, *classes_of(lengths), module=module)
    return max(judge(found[name], ref[name], base[name]).ratio for name in found)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name, planted):
    assert worst(planted(*PLANTED[name]), "" if name in SEEN_WITHOUT_DROPOUT else "dropout") > 1


def test_without_an_error_nothing_is_caught(planted):
    assert all(worst(planted("scale", "scale"), kind) < 1 for kind in ("", "dropout"))
