"""csrc/cuda/attention*.cu without a GPU: fragments, tiles, guarded memory, and planted errors that all this must find.

The sources are compiled once, with every planted error in them, of which `emulated_bug` chooses one; 0 is none.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from fastbert.parity import judge
from tests.build.conftest import ROOT
from tests.ops import philox
from tests.ops.attention_calls import Results, call, classes_of
from tests.ops.cases import DTYPES, normal

EMULATOR = ROOT / "tests/emulator"
GUARD = 2**15  # elements of NaN on either side of what is read, and of a value that must stay beside what is written
UNTOUCHED = -7.0
# Around the tiles of 16, 32, 64 and 128
LENGTHS = (1, 64, 15, 129, 16, 17, 0, 63, 65, 127, 128, 31, 33)


class Attention(ctypes.Structure):  # csrc/attention.h
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cu_seqlens", "order", "keep_bits")),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("tokens", "width")),
        *((name, ctypes.c_int) for name in ("heads", "dim")),
        *((name, ctypes.c_float) for name in ("scale", "keep_scale")),
    )


class Sequences(ctypes.Structure):
    _fields_ = (("batch", ctypes.c_int), ("longest", ctypes.c_int), ("classes", ctypes.c_void_p))


BARRIER = "__syncthreads();"
# file, what is right, what is wrong where BUG is true, the call that shows it: its dtype, a backward's where it begins
# with "d"
PLANTED = {
    "the next tile is not waited for": (
        "attention.cu",
        "wait_for_copies<0>();\n    __sync",
        "if (!BUG) wait_for_copies<0>();\n    __sync",
        "bf16",
    ),
    "the first tile is not waited for": (
        "attention.cu",
        "wait_for_copies<0>();\n  __sync",
        "if (!BUG) wait_for_copies<0>();\n  __sync",
        "bf16",
    ),
    "no barrier before the first tile is read": (
        "attention.cu",
        f"{BARRIER}\n\n  const int my_left",
        f"if (!BUG) {BARRIER}\n\n  const int my_left",
        "bf16",
    ),
    "no barrier between tiles": (
        "attention.cu",
        f"{BARRIER}\n  }}\n  if (my_left",
        f"if (!BUG) {BARRIER}\n  }}\n  if (my_left",
        "bf16",
    ),
    "a barrier that half of the lanes reach at another place": (
        "attention.cu",
        "if (first + kKeys <",
        f"if (BUG && lane % 2) {BARRIER}\n    if (first + kKeys <",
        "bf16",
    ),
    "a barrier that one warp does not reach": (
        "attention.cu",
        f"{BARRIER}\n  }}\n  if (my_left",
        f"if (!BUG || warp != 1) {BARRIER}\n  }}\n  if (my_left",
        "bf16",
    ),
    "a group that is not committed": ("attention.cu", "commit_copies();", "if (!BUG) commit_copies();", "bf16"),
    "the next tile over the one that is read": ("attention.cu", "kKeys, stage ^ 1);", "kKeys, stage ^ !BUG);", "bf16"),
    "out is read before all lanes wrote it": (
        "attention.cu",
        "__syncwarp();\n  T* const to",
        "if (!BUG) __syncwarp();\n  T* const to",
        "bf16",
    ),
    "a product that a lane skips": (
        "attention.cu",
        "mma<T>(sums[tile][2 * pair],",
        "if (!BUG || lane != 9) mma<T>(sums[tile][2 * pair],",
        "bf16",
    ),
    "a load that a lane skips": (
        "attention.cu",
        "load_matrices<true>(b,",
        "if (!BUG || lane != 9) load_matrices<true>(b,",
        "bf16",
    ),
    "a maximum that a lane skips": (
        "attention.cu",
        "larger = fmaxf(larger, __shfl_xor_sync(kWholeWarp, larger, 2));",
        "if (!BUG || lane != 9) larger = fmaxf(larger, __shfl_xor_sync(kWholeWarp, larger, 2));",
        "bf16",
    ),
    "rows behind the sequence are read": (
        "attention.cu",
        "row < left ? dim - column",
        "BUG || row < left ? dim - column",
        "bf16",
    ),
    "columns behind the head are read": ("attention.cu", "? dim - column : 0", "? dim + 16 * BUG - column : 0", "bf16"),
    "shared memory that nothing was copied to": (
        "attention.cu",
        "copy_16(to, chunk, columns > 0);",
        "if (!BUG || columns > 0) copy_16(to, chunk, columns > 0);",
        "bf16",
    ),
    "rows behind the sequence are written": (
        "attention.cu",
        "down < my_left ? dim",
        "BUG || down < my_left ? dim",
        "bf16",
    ),
    "lse behind the sequence is written": (
        "attention.cu",
        "column == 0 && group",
        "column == 0 && BUG * -99 + group",
        "bf16",
    ),
    "the halves of the queries' fragment swapped": (
        "attention.cu",
        "(tile * 16 + lane % 16, step * 2",
        "(tile * 16 + (lane ^ 8 * BUG) % 16, step * 2",
        "bf16",
    ),
    "the keys of a pair swapped": (
        "attention.cu",
        "pair * 16 + lane / 16 * 8",
        "pair * 16 + (lane / 16 ^ BUG) * 8",
        "bf16",
    ),
    "values not transposed": (
        "attention.cu",
        "load_matrices<true>(b, value_tile + swizzled<kDims>(step * 16 + lane % 16, pair * 2 + lane / 16));",
        "{ auto at = value_tile + swizzled<kDims>(step * 16 + lane % 16, pair * 2 + lane / 16);"
        " if (BUG) load_matrices<false>(b, at);\n else load_matrices<true>(b, at); }",
        "bf16",
    ),
    "the two of a pair swapped": (
        "attention.cu",
        "pair_of<T>(two[0], two[1])",
        "pair_of<T>(two[BUG], two[!BUG])",
        "bf16",
    ),
    "out is read where it was not written": (
        "attention.cu",
        "mine + swizzled<kDims>(down, chunk);",
        "mine + (BUG ? down * kDims + chunk * 8 : swizzled<kDims>(down, chunk));",
        "bf16",
    ),
    "a key behind the last": (
        "attention.cu",
        "e % 2 < keys_left) continue",
        "e % 2 < keys_left + BUG) continue",
        "bf16",
    ),
    "the last key missing": ("attention.cu", "8 * n + column + e", "8 * n + BUG + column + e", "bf16"),
    "old sums not scaled down": (
        "attention.cu",
        "sums[tile][n][2 * half] *= shrink",
        "sums[tile][n][2 * half] *= BUG ? 1 : shrink",
        "bf16",
    ),
    "old totals not scaled down": (
        "attention.cu",
        "total[tile][half] *= shrink",
        "total[tile][half] *= BUG ? 1 : shrink",
        "bf16",
    ),
    "a total of one lane": (
        "attention.cu",
        "all += __shfl_xor_sync(kWholeWarp, all, 2);",
        "all += (BUG ? 0 : 1) * __shfl_xor_sync(kWholeWarp, all, 2);",
        "bf16",
    ),
    "lse of unscaled scores": (
        "attention.cu",
        "most[tile][half] * inputs.scale",
        "most[tile][half] * (BUG ? 1 : inputs.scale)",
        "bf16",
    ),
    "keep bits of the tile's first word": ("attention.cu", "(words[n / 4])", "(words[BUG ? 0 : n / 4])", "bf16"),
    "keep bits of the fragment's first row": (
        "attention.cu",
        "(row + mine_down) * inputs.width",
        "(row + !BUG * mine_down) * inputs.width",
        "bf16",
    ),
    "a byte's keep bits for all": ("attention.cu", "(n % 4 * 8 + e) & 1", "(!BUG * (n % 4 * 8) + e) & 1", "bf16"),
    "dropout's scale missing": (
        "attention.cu",
        "inputs.keep_scale / all",
        "(BUG ? 1 : inputs.keep_scale) / all",
        "bf16",
    ),
    "the order is not read": (
        "attention.cuh",
        "inputs.order == nullptr ?",
        "BUG || inputs.order == nullptr ?",
        "bf16 classes",
    ),
    "the first head for all": (
        "attention.cuh",
        "share.head) * inputs.dim",
        "!BUG * share.head) * inputs.dim",
        "bf16 classes",
    ),
    "no barrier before a plain tile is read": (
        "attention.cu",
        f"{BARRIER}\n    float found",
        f"if (!BUG) {BARRIER}\n    float found",
        "fp32",
    ),
    "lanes that do not wait before plain scores are read": (
        "attention.cu",
        "__syncwarp();  // a warp has the scores of its own rows\n    Tile::template",
        "if (!BUG) __syncwarp();  // a warp has the scores of its own rows\n    Tile::template",
        "fp32",
    ),
    "no barrier after a plain tile was read": (
        "attention.cu",
        f"scores, values);\n    {BARRIER}",
        f"scores, values);\n    if (!BUG) {BARRIER}",
        "fp32",
    ),
    "lanes that do not wait before the factors of rows are read": (
        "attention.cu",
        "__syncwarp();\n  Tile::store",
        "if (!BUG) __syncwarp();\n  Tile::store",
        "fp32",
    ),
    "a plain row behind the sequence is read": (
        "attention.cuh",
        "row < left && column < dim",
        "(BUG || row < left) && column < dim",
        "fp32",
    ),
    "a plain row behind the sequence is written": (
        "attention.cuh",
        "if (row >= left) return",
        "if (!BUG && row >= left) return",
        "fp32",
    ),
    "a plain key behind the last": ("attention.cu", "8 * i >= share.length)", "8 * i >= share.length + BUG)", "fp32"),
    "no barrier before a tile of dq is read": (
        "attention_backward.cu",
        f"{BARRIER}\n    Tile::products(prob",
        f"if (!BUG) {BARRIER}\n    Tile::products(prob",
        "dfp32",
    ),
    "lanes that do not wait before scores of dq are read": (
        "attention_backward.cu",
        "__syncwarp();  // a warp has the scores of its own rows\n    Tile::template add_rows<false>",
        "if (!BUG) __syncwarp();  // a warp has the scores of its own rows\n    Tile::template add_rows<false>",
        "dfp32",
    ),
    "no barrier after a tile of dq was read": (
        "attention_backward.cu",
        f"scores, keys);\n    {BARRIER}",
        f"scores, keys);\n    if (!BUG) {BARRIER}",
        "dfp32",
    ),
    "no barrier before a tile of dk is read": (
        "attention_backward.cu",
        f"{BARRIER}\n    float found",
        f"if (!BUG) {BARRIER}\n    float found",
        "dfp32",
    ),
    "no barrier before scores of dk are read": (
        "attention_backward.cu",
        f"{BARRIER}\n    Tile::template add_rows<true>(dkey",
        f"if (!BUG) {BARRIER}\n    Tile::template add_rows<true>(dkey",
        "dfp32",
    ),
    "no barrier after a tile of dk was read": (
        "attention_backward.cu",
        f"dropped, grads);\n    {BARRIER}",
        f"dropped, grads);\n    if (!BUG) {BARRIER}",
        "dfp32",
    ),
    "a probability of no key": ("attention_backward.cu", "is_key ? prob", "BUG || is_key ? prob", "dbf16"),
    "delta missing": (
        "attention_backward.cu",
        "delta[r] /= inverse[r];",
        "delta[r] /= inverse[r] * (BUG ? 1e9f : 1);",
        "dbf16",
    ),
    "dropout's scale missing in dp": (
        "attention_backward.cu",
        "? dfound[r][i] * inputs.keep_scale",
        "? dfound[r][i] * (BUG ? 1 : inputs.keep_scale)",
        "dbf16",
    ),
    "dv of what was dropped": (
        "attention_backward.cu",
        "is_kept ? probability",
        "BUG || is_kept ? probability",
        "dbf16",
    ),
    "keep bits of the first keys": (
        "attention_backward.cu",
        "nullptr, share.first);",
        "nullptr, BUG ? 0 : share.first);",
        "dbf16",
    ),
    "scale missing in dq": ("attention_backward.cu", "sums, inputs.scale", "sums, BUG ? 1 : inputs.scale", "dbf16"),
    "scale missing in dk": ("attention_backward.cu", "dkey, inputs.scale", "dkey, BUG ? 1 : inputs.scale", "dbf16"),
}


@pytest.fixture(scope="module")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels with all planted errors, none of them chosen."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for number, (file, right, wrong, _) in enumerate(PLANTED.values(), 1):
        source = folder / "csrc/cuda" / file
        text = source.read_text()
        assert right in text, right
        marked = wrong.replace("BUG", f"(emulated_bug == {number})")
        source.write_text(text.replace(right, marked))
    target = folder / "attention.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    flags += ["-DFASTBERT_EMULATED", *os.environ.get("CXXFLAGS", "").split()]  # test_sanitizers.py's
    paths = [f"-I{EMULATOR}", f"-I{folder / 'csrc'}", str(EMULATOR / "attention.cpp"), "-o", str(target)]
    subprocess.run([compiler, *flags, *paths], check=True)
    library = ctypes.CDLL(str(target))
    library.emulated_attention.restype = library.emulated_attention_backward.restype = ctypes.c_char_p
    return library


def guarded(x: Tensor | None) -> tuple[ctypes.c_void_p | None, Tensor | None]:
    """The address of a copy of x with a guard around it, and what must be kept as long as the address is used."""
    if x is None:
        return None, None
    memory = torch.full((GUARD + x.numel() + GUARD,), float("nan") if x.is_floating_point() else 2**30).to(x.dtype)
    memory[GUARD : GUARD + x.numel()] = x.flatten()
    return ctypes.c_void_p(memory.data_ptr() + GUARD * x.element_size()), memory


class Output:
    """Memory for a tensor, full of NaN, between guards that raise where they were written to."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.size, self.shape = torch.Size(shape).numel(), shape
        self.memory = torch.full((GUARD + self.size + GUARD,), UNTOUCHED, dtype=dtype)
        self.memory[GUARD : GUARD + self.size] = torch.nan
        self.pointer = ctypes.c_void_p(self.memory.data_ptr() + GUARD * self.memory.element_size())

    def found(self) -> Tensor:
        if (self.memory[:GUARD] != UNTOUCHED).any() or (self.memory[GUARD + self.size :] != UNTOUCHED).any():
            raise RuntimeError("written beside the output")
        return self.memory[GUARD : GUARD + self.size].view(self.shape)


def run(
    library: ctypes.CDLL, arguments: tuple, grad: Tensor, order: Tensor | None = None, classes: list[int] | None = None,
    backward: bool = True,
) -> Results:  # fmt: skip
    """Raises RuntimeError where the kernels say an error or write beside their outputs."""
    qkv, cu_seqlens, longest, scale, bits, p = arguments
    tokens, _, heads, dim = qkv.shape
    pointers, _kept = zip(*map(guarded, (qkv, cu_seqlens, order, bits, grad)), strict=True)
    width = 0 if bits is None else bits.shape[2]
    inputs = Attention(*pointers[:4], DTYPES_THERE.index(qkv.dtype), tokens, width, heads, dim, scale, philox.scale(p))
    counts = None if classes is None else (ctypes.c_int64 * 5)(*classes)
    sequences = Sequences(len(cu_seqlens) - 1, longest, ctypes.cast(counts, ctypes.c_void_p) if counts else None)
    both = ctypes.byref(inputs), ctypes.byref(sequences)
    out, lse = Output(tokens, heads, dim, dtype=qkv.dtype), Output(heads, tokens, dtype=torch.float32)
    raise_words(library.emulated_attention(*both, out.pointer, lse.pointer))
    found = {"out": out.found(), "lse": lse.found()}
    if backward:
        rows, dqkv = Output(2, heads, tokens, dtype=torch.float32), Output(*qkv.shape, dtype=qkv.dtype)
        more = pointers[4], lse.pointer, rows.pointer, dqkv.pointer
        raise_words(library.emulated_attention_backward(*both, *more))
        rows.found()
        found["dqkv"] = dqkv.found()
    return found


DTYPES_THERE = [torch.float32, torch.float16, torch.bfloat16]  # csrc/dtype.h


def raise_words(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


@pytest.fixture(params=[0, 1], ids=["first warp first", "last warp first"])
def ordered(request: pytest.FixtureRequest, library: ctypes.CDLL) -> ctypes.CDLL:
    library.emulated_setting(0, request.param)
    return library


# Fragments, as the PTX ISA says where their elements are ("Matrix Fragments for mma.m16n8k16 with floating point type")


def places_of_a(lane: int, i: int) -> tuple[int, int]:
    """Row and column of a's element i of a lane."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8


def places_of_b(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group


def places_of_c(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def fragment(matrix: Tensor, places, count: int) -> Tensor:
    """[32, count] by lane."""
    return torch.stack([torch.stack([matrix[places(lane, i)] for i in range(count)]) for lane in range(32)])


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_twin_of_mma_has_the_layout_of_ptx(dtype: torch.dtype, ordered: ctypes.CDLL) -> None:
    """Numbers whose products and sums are exact; each element of each matrix counts."""
    a, b, c = normal(16, 16, like="a"), normal(16, 8, like="b"), normal(16, 8, like="c")
    a, b, c = (a * 8).round().to(dtype), (b * 8).round().to(dtype), (c * 8).round().float()
    sums = fragment(c, places_of_c, 4).contiguous()
    parts = fragment(a, places_of_a, 8).contiguous(), fragment(b, places_of_b, 4).contiguous()
    ordered.emulated_product(int(dtype == torch.float16), *map(address, parts), address(sums))
    assert torch.equal(sums, fragment((a.double() @ b.double() + c.double()).float(), places_of_c, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_twin_of_ldmatrix_has_the_layout_of_ptx(transposed: bool, ordered: ctypes.CDLL) -> None:
    """Rows at any places; of matrix i register i of a lane has row lane / 4, columns lane % 4 * 2 and the next."""
    memory = torch.arange(64 * 8, dtype=torch.int16)
    places = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32].int()
    loaded = torch.zeros(32, 4, 2, dtype=torch.int16)
    ordered.emulated_matrices(int(transposed), address(memory), address(places), address(loaded))
    matrices = memory.view(64, 8)[places.long()].view(4, 8, 8)
    matrices = matrices.mT if transposed else matrices
    for lane, i, right in itertools.product(range(32), range(4), range(2)):
        assert loaded[lane, i, right] == matrices[i, lane >> 2, lane % 4 * 2 + right]


def test_the_twin_of_cp_async_copies_late(library: ctypes.CDLL) -> None:
    """Neither old nor new before the wait: NaN; zeros where nothing is read."""
    source, target = torch.arange(1, 25, dtype=torch.int16), torch.full((3, 8), 99, dtype=torch.int16)
    seen = torch.zeros(4, 3, 8, dtype=torch.int16)
    library.emulated_copies(address(source), address(target), address(seen))
    new = source.view(3, 8).clone()
    new[2] = 0
    for time, done in enumerate((0, 1, 2, 3)):
        assert torch.equal(seen[time, :done], new[:done]) and (seen[time, done:] == -1).all()


# Tiles


def test_fewer_queries_a_block_where_multiprocessors_would_stand_idle(library: ctypes.CDLL) -> None:
    queries = library.emulated_attention_queries
    queries.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int
    assert queries(512, 64, 12 * 32, 132) == queries(512, 32, 33, 132) == 128
    assert queries(512, 64, 12, 132) == queries(128, 64, 131, 132) == 64
    assert queries(64, 64, 10**9, 132) == 64, "no more than the longest has"
    assert queries(512, 128, 12 * 32, 132) == 64 and queries(512, 128, 2, 132) == queries(32, 80, 10**6, 132) == 32


SHORT = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)


@SHORT
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("kind", ["dropout", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("", "peaked"))])
def test_lengths_around_tiles(dtype: torch.dtype, dim: int, kind: str, library: ctypes.CDLL, parity) -> None:
    """In one launch and by length classes, which have other tiles; in both orders of warps."""
    arguments, grad, ref, base = call(LENGTHS, 1, dim, dtype, kind)
    for order, (name, work) in enumerate({"one launch": (), "classes": classes_of(LENGTHS)}.items()):
        library.emulated_setting(0, order)
        for output, ours in run(library, arguments, grad, *work).items():
            parity(ours, ref[output], base[output], name=f"attention/emulated/{output}/{name}/{kind}")


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_lengths_around_tiles(dtype: torch.dtype, dim: int, ordered: ctypes.CDLL, parity) -> None:
    lengths = (511, 256, 512, 513, 257)
    arguments, grad, ref, base = call(lengths, 1, dim, dtype, "dropout")
    for output, ours in run(ordered, arguments, grad, *classes_of(lengths)).items():
        parity(ours, ref[output], base[output], name=f"attention/emulated/{output}/long")


@SHORT
@pytest.mark.parametrize("dim", [1, 8, 33, 40, 80, 120, 127])
def test_head_dims_between(dtype: torch.dtype, dim: int, library: ctypes.CDLL, parity) -> None:
    """Padded with zeros to the next of 32, 64 and 128, by 16 bytes where rows stand so, else by elements."""
    library.emulated_setting(0, dim % 2)
    lengths = (17, 70, 0, 131)
    arguments, grad, ref, base = call(lengths, 2, dim, dtype, "dropout")
    for output, ours in run(library, arguments, grad, *classes_of(lengths)).items():
        parity(ours, ref[output], base[output], name=f"attention/emulated/{output}/dim {dim}")


@SHORT
def test_nan_in_a_sequence_stays_there(dtype: torch.dtype, ordered: ctypes.CDLL) -> None:
    """All other rows are bitwise as they were."""
    lengths = (70, 17, 130, 3)
    arguments, grad, *_ = call(lengths, 2, 40, dtype, "dropout")
    before = run(ordered, arguments, grad)
    for start, end in itertools.pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        others = torch.ones(sum(lengths), dtype=torch.bool)
        others[start:end] = False
        poisoned = arguments[0].clone()
        poisoned[start:end] = torch.nan
        after = run(ordered, (poisoned, *arguments[1:]), grad)
        for name, dim in (("out", 0), ("lse", 1), ("dqkv", 0)):
            old, new = before[name].movedim(dim, 0), after[name].movedim(dim, 0)
            assert torch.equal(old[others], new[others]) and new[~others].isnan().all()


def test_all_are_dropped(library: ctypes.CDLL) -> None:
    library.emulated_setting(0, 0)
    for dtype in DTYPES:
        (qkv, cu_seqlens, longest, scale, *_), grad, *_ = call((20, 3), 2, 16, dtype)
        bits = torch.zeros(2, 23, 1, dtype=torch.int32)
        found = run(library, (qkv, cu_seqlens, longest, scale, bits, 1.0), grad)
        assert not found["out"].any() and not found["dqkv"].any() and found["lse"].isfinite().all()


# Planted errors


def problem(library: ctypes.CDLL, kind: str) -> str:
    """ "" or what is wrong with the result of a call, in either order of warps."""
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    lengths = (70, 17, 130, 3)
    arguments, grad, ref, base = call(lengths, 2, 40, dtype, "peaked" if "peaked" in kind else "dropout")
    work = classes_of(lengths) if "classes" in kind else (torch.tensor([2, 0, 1, 3], dtype=torch.int32), None)
    try:
        found = run(library, arguments, grad, *work, backward=kind.startswith("d"))
    except RuntimeError as error:
        return str(error)
    ratios = {name: judge(found[name], ref[name], base[name]).ratio for name in found}
    return "" if all(ratio <= 1 for ratio in ratios.values()) else str(ratios)


def test_without_an_error_nothing_is_found(ordered: ctypes.CDLL) -> None:
    assert {problem(ordered, kind) for kind in {kind for *_, kind in PLANTED.values()}} == {""}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_errors_are_found(bug: str, library: ctypes.CDLL) -> None:
    for order in (0, 1):
        library.emulated_setting(list(PLANTED).index(bug) + 1, order)
        if said := problem(library, PLANTED[bug][-1]):
            print(said)
            return
    pytest.fail("not found")
