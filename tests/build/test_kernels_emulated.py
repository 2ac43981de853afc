"""Errors planted in csrc/cuda/ are found by what tests/ops asks of every kernel, emulated on the CPU.

All are compiled into one library, in which `emulated_bug` chooses one of them; 0 is none.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from fastbert import native, ops
from tests import emulated
from tests.build.conftest import ROOT
from tests.ops import cases, philox
from tests.ops.cases import Case, cast
from tests.ops.common import Backend, verdicts
from tests.ops.gradients import gradient_verdicts
from tests.poison import poisoned_memory

NAME = "fastbert_planted"
CUDA = Backend("cuda", "cpu")
# Three warps a row; long runs of one key, over more chunks than a block has warps; columns that no vector divides.
CASES = (
    Case("wide", (5, 0, 3), 10, 64, 600, "three warps a row"),
    Case("long", (330, 270), 1, 16, 32, "runs of more chunks than a block has warps"),
    Case("odd", (33, 31), 1, 33, 131, "columns that no vector width divides"),
)
BARRIER = "__syncthreads();\n"
PLANTED = {  # file, what is right, what is wrong, the op that shows it
    "no barrier before the sums of a row are read": (
        "rows.cuh",
        f"{BARRIER}  Sum total",
        f"BUG {BARRIER}  Sum total",
        "add_layer_norm",
    ),
    "the second sum of a row in the first's memory": (
        "rows.cuh",
        "parts[1][threadIdx.z]",
        "parts[HERE ? 0 : 1][threadIdx.z]",
        "add_layer_norm",
    ),
    "a shuffle that a lane skips": (
        "rows.cuh",
        "const float value = __shfl",
        "const float value = HERE && threadIdx.x == 9 ? 0 : __shfl",
        "add_layer_norm",
    ),
    "a barrier that one warp of a row does not reach": (
        "rows.cuh",
        "if (blockDim.y == 1)",
        "if (blockDim.y == 1 || (HERE && threadIdx.y == 1))",
        "add_layer_norm",
    ),
    "the last step of a warp's sum is left out": ("rows.cuh", "distance > 0;", "distance > HERE;", "add_layer_norm"),
    "shared memory that no warp wrote": (
        "rows.cuh",
        "warp < blockDim.y;",
        "warp < blockDim.y + HERE;",
        "add_layer_norm",
    ),
    "columns behind the row count": ("rows.cuh", "x[i] = i < left ?", "x[i] = HERE || i < left ?", "add_layer_norm"),
    "the last column of a row is not written": (
        "rows.cuh",
        "if (i < left) to[i]",
        "if (i < left - HERE) to[i]",
        "bias_gelu",
    ),
    "a root that is not rounded": (
        "rows.cuh",
        "rstd = __frsqrt_rn(",
        "rstd = (1 + 1e-5f * HERE) * __frsqrt_rn(",
        "add_layer_norm",
    ),
    "eps in 16 bits": (
        "add_layer_norm.cu",
        "inputs.hidden, eps,",
        "inputs.hidden, HERE ? 0.0f : eps,",
        "add_layer_norm",
    ),
    "six rounds of the generator": ("dropout.cuh", "round < kRounds;", "round < kRounds - HERE;", "dropout_bits"),
    "the halves of a word swapped": (
        "dropout.cuh",
        "<< (2 * i);",
        "<< (2 * i + HERE);",
        "dropout_bits",
    ),
    "the site of dropout is forgotten": (
        "dropout.cuh",
        "dropout.site, 0",
        "HERE ? 0 : dropout.site, 0",
        "add_layer_norm",
    ),
    "keys behind the sequence are kept": (
        "dropout_bits.cu",
        "if (left > 0 && left < 32)",
        "if (!HERE && left > 0 && left < 32)",
        "dropout_bits",
    ),
    "the next sequence's length": (
        "dropout_bits.cu",
        "cu_seqlens[middle + 1] > row",
        "cu_seqlens[middle + 1] >= row + !HERE",
        "dropout_bits",
    ),
    "no barrier before partial sums are added": (
        "parts.cuh",
        f"{BARRIER}  if (threadIdx.y != 0 ||",
        f"BUG {BARRIER}  if (threadIdx.y != 0 ||",
        "add_layer_norm_backward",
    ),
    "the last partial sum is left out": (
        "parts.cuh",
        "part < count;",
        "part < count - HERE;",
        "add_layer_norm_backward",
    ),
    "the gradient of x without dropout": (
        "add_layer_norm.cu",
        "drop(grad, inputs",
        "if (!HERE) drop(grad, inputs",
        "add_layer_norm_backward",
    ),
    "the bias counts twice": (
        "add_layer_norm.cu",
        "total[i] += bias[i]",
        "total[i] += (1 + HERE) * bias[i]",
        "add_layer_norm_backward",
    ),
    "token types forgotten": (
        "embed_layer_norm.cu",
        "+= part[i];\n  }\n  load",
        "+= HERE ? 0 : part[i];\n  }\n  load",
        "embed_layer_norm",
    ),
    "the padding row gets a gradient": (
        "embed_layer_norm.cu",
        "place != padding",
        "(HERE || place != padding)",
        "embed_layer_norm_backward",
    ),
    "every run begins in its chunk": (
        "embed_layer_norm.cu",
        "(is_later ? 0 : hidden)",
        "(is_later && !HERE ? 0 : hidden)",
        "embed_layer_norm_backward",
    ),
    "chunks of a long run are left out": (
        "embed_layer_norm.cu",
        "at += kJoiners)",
        "at += kJoiners + HERE)",
        "embed_layer_norm_backward",
    ),
    "no barrier before the parts of a run are added": (
        "embed_layer_norm.cu",
        f"{BARRIER}  if (threadIdx.y != 0) return;",
        f"BUG {BARRIER}  if (threadIdx.y != 0) return;",
        "embed_layer_norm_backward",
    ),
    "no barrier before a column is added up": (
        "bias_gelu.cu",
        f"{BARRIER}  for",
        f"BUG {BARRIER}  for",
        "bias_gelu_backward",
    ),
    "the last row of a block is left out": (
        "bias_gelu.cu",
        "down < kDown;",
        "down < kDown - HERE;",
        "bias_gelu_backward",
    ),
    "a slope without its density": (
        "gelu.cuh",
        "-x * x * kHalfLog2E",
        "-x * x * (HERE ? 1 : kHalfLog2E)",
        "bias_gelu_backward",
    ),
    "the tail of Phi by 1 - erf": (
        "gelu.cuh",
        "0.5f * erfcf(-x * kSqrtHalf)",
        "0.5f * (HERE ? 1 - erff(-x * kSqrtHalf) : erfcf(-x * kSqrtHalf))",
        "far tails",
    ),
    "bfloat16 cut off": ("dtypes.cuh", "bits + 0x7fffu", "bits + (HERE ? 0 : 0x7fffu)", "rounding to bfloat16"),
    "float16 rounded up": (
        "dtypes.cuh",
        "magnitude + 0xfffu",
        "magnitude + (HERE ? 0x1fffu : 0xfffu)",
        "rounding to float16",
    ),
    "an index behind its table": (
        "embed_layer_norm.cu",
        "place < table.size",
        "place < table.size + HERE",
        "indices outside",
    ),
    "a row of a padded batch that is no row": ("pad.cu", "has_source ? x[word]", "has_source || HERE ? x[word]", "pad"),
    "every row from the first token": (
        "pad.cu",
        "static_cast<int>(token));",
        "static_cast<int>(HERE ? 0 : token));",
        "pad",
    ),
}
NUMBERS = {bug: number for number, bug in enumerate(PLANTED, 1)}


@pytest.fixture(scope="module")
def choose(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], None]:
    """Compiles all errors into one library and loads it; then chooses one of them by its number."""
    if not emulated.is_here():
        pytest.skip("no C++ compiler on this machine")
    csrc = shutil.copytree(ROOT / "csrc", tmp_path_factory.mktemp("planted") / "csrc")
    for bug, (file, right, wrong, _) in PLANTED.items():
        path = csrc / "cuda" / file
        source = path.read_text()
        assert right in source, bug
        here = f"(emulated_bug == {NUMBERS[bug]})"
        path.write_text(source.replace(right, wrong.replace("BUG", f"if (!{here})").replace("HERE", here)))
    (csrc / "planted.h").write_text("extern int emulated_bug;\n")
    exported = '__attribute__((visibility("default")))'
    (csrc / "planted.cpp").write_text(
        "#include <cuda_runtime.h>\nint emulated_bug;\n"
        f'extern "C" {exported} void choose(int bug, int order) {{'
        " emulated_bug = bug; emulator::order = static_cast<emulator::Order>(order); }\n"
    )
    library = emulated.built(csrc, NAME, "-include", str(csrc / "planted.h"))
    native.load_emulated(library, NAME)
    return ctypes.CDLL(str(library)).choose  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _planted(choose: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The planted library serves backend "cuda" for one test, and no self-check stands before it."""
    monkeypatch.setattr(native, "_emulated", NAME)
    for op in ops.ALL:
        for dtype in (*cases.DTYPES, torch.int64):
            if "cuda" in op.backends:
                monkeypatch.setitem(op.backends["cuda"].verdicts, (dtype, torch.device("cpu")), "")
    with poisoned_memory():
        yield
    choose(0, 2)


def is_found(shown: str) -> bool:
    """Whether what tests/ops asks of an op shows an error."""
    try:
        return CHECKS[shown]()
    except RuntimeError as error:
        assert "wait for each other" in str(error)
        return True


def broken(op: str) -> bool:
    spec = next(s for s in cases.SPECS if s.op.name == op.removesuffix("_backward"))
    judged = gradient_verdicts if op.endswith("_backward") else verdicts
    return any(not ratio <= 1 for case in CASES for _, ratio in judged(spec, case, torch.float32, CUDA))


def wrong_bits() -> bool:
    cu_seqlens = torch.tensor([0, 40, 40, 43, 143], dtype=torch.int32)
    with ops.use_backend("cuda"):
        found = ops.dropout_bits(torch.tensor(cases.SEED), 5, cu_seqlens, 143, 100, 2, 0.3)
    return not torch.equal(found, philox.bits(cases.SEED, 5, cu_seqlens, 100, 2, 0.3))


def wrong_tails() -> bool:
    x = cases.gelu_inputs(torch.float32, "none")[0]
    ref = cases.BIAS_GELU.reference(x, None)
    with ops.use_backend("cuda"):
        found = ops.bias_gelu(x.float(), None)
    inside = (x > -12) & (x < -1)
    return not torch.allclose(found[inside].double(), ref[inside], rtol=1e-4, atol=0)


def wrong_rounding(dtype: torch.dtype) -> bool:
    """Far out GELU is the sum with the bias, rounded once; to the nearest, ties to even, infinity and NaN kept."""
    steps = torch.arange(512, dtype=torch.float32)
    x = torch.cat([steps + 64, torch.tensor([torch.nan, torch.inf, 65504.0, 65504.0])]).to(dtype)
    bias = torch.cat([steps * 37 % 512 / 128, torch.tensor([1.0, 1.0, 15.0, 16.0])]).to(dtype)
    with ops.use_backend("cuda"):
        found = ops.bias_gelu(x[None], bias)[0]
    return not torch.equal(found.nan_to_num(-1), (x.float() + bias.float()).to(dtype).nan_to_num(-1))


def wrong_indices() -> bool:
    """A row with an index outside its table is NaN and gives no gradient; no other row changes."""
    _, exact = next(iter(cases.EMBED_LAYER_NORM.inputs(CASES[2], torch.float32)))
    ids, types, positions, words, kinds, places, *rest = cast(exact, torch.float32)
    found = False
    for which, index in ((0, 29), (0, -1), (1, 2), (1, -(2**40)), (2, len(places)), (2, 2**31)):
        changed = [ids.clone(), types.clone(), positions.clone()]
        changed[which][7] = index
        leaves = [t.clone().requires_grad_() for t in (words, kinds, places)]
        with ops.use_backend("cuda"):
            before = ops.embed_layer_norm(ids, types, positions, words, kinds, places, *rest)[0]
            y = ops.embed_layer_norm(*changed, *leaves, *rest)[0]
            others = torch.arange(len(ids)) != 7
            y[others].sum().backward()
        found |= not (y[7].isnan().all() and torch.equal(y[others], before[others]))
        found |= not all(leaf.grad.isfinite().all() for leaf in leaves)
    return found


def wrong_rows() -> bool:
    x = torch.randn(3, 8)
    with ops.use_backend("cuda"):
        found = ops.pad(x, torch.tensor([4, 1, 4]), 2, 3).flatten(0, 1)
    return not (torch.equal(found[4], x[2]) and torch.equal(found[1], x[1]) and not found[[0, 2, 3, 5]].any())


CHECKS = {
    "dropout_bits": wrong_bits,
    "far tails": wrong_tails,
    "indices outside": wrong_indices,
    "pad": wrong_rows,
    "rounding to bfloat16": lambda: wrong_rounding(torch.bfloat16),
    "rounding to float16": lambda: wrong_rounding(torch.float16),
} | {
    op: lambda op=op: broken(op)
    for op in (
        "add_layer_norm", "add_layer_norm_backward", "embed_layer_norm", "embed_layer_norm_backward", "bias_gelu",
        "bias_gelu_backward",
    )
}  # fmt: skip


@pytest.mark.parametrize("shown", CHECKS)
@pytest.mark.parametrize("order", [0, 1], ids=["forwards", "backwards"])
def test_nothing_is_found_where_nothing_is_planted(shown: str, order: int, choose: Callable[[int, int], None]) -> None:
    choose(0, order)
    assert not is_found(shown)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_errors_are_found(bug: str, choose: Callable[[int, int], None]) -> None:
    """In one of the two orders in which blocks and warps run."""
    found = False
    for order in (0, 1):
        choose(NUMBERS[bug], order)
        found = found or is_found(PLANTED[bug][3])
    assert found
