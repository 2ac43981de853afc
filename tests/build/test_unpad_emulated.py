"""csrc/cuda/unpad.cu without a GPU: compiled unchanged for the CPU over tests/emulator/cuda_runtime.h."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.build.conftest import ROOT
from tests.build.masks import CASES, expected_unpad

EMULATOR = ROOT / "tests/emulator"
GUARD = 2048  # elements on either side of each output that must stay as they were
UNTOUCHED = -7
Unpad = Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]


class Mask(ctypes.Structure):  # csrc/unpad.h
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
        ("element_size", ctypes.c_int),
        ("keep", ctypes.c_uint64),
    )


def compile_emulated(csrc: Path, compiler: str, target: Path) -> Unpad:
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    flags += os.environ.get("CXXFLAGS", "").split()  # test_sanitizers.py's
    command = [compiler, *flags, f"-I{EMULATOR}", f"-I{csrc}", str(EMULATOR / "unpad.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.emulated_count.restype = library.emulated_fill.restype = ctypes.c_char_p

    def unpad(mask: Tensor, order: int, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """more: of indices than there are tokens, as if the host had told so many."""
        keep = 2 ** (8 * mask.element_size() - 1) - 1 if mask.is_floating_point() else 2**64 - 1
        view = Mask(mask.data_ptr(), *mask.shape, *mask.stride(), mask.element_size(), keep)
        cu_seqlens, cu_pointer, check_cu_seqlens = guarded(mask.shape[0] + 1, torch.int32)
        ranked, ranked_pointer, check_ranked = guarded(mask.shape[0], torch.int32)
        total = ctypes.c_int64(UNTOUCHED)
        raise_words(library.emulated_count(ctypes.byref(view), order, cu_pointer, ranked_pointer, ctypes.byref(total)))
        check_cu_seqlens()
        check_ranked()
        if not 0 <= total.value <= mask.numel():
            raise RuntimeError(f"{total.value} real tokens")
        tokens = max(total.value + more, 0)
        indices, indices_pointer, check_indices = guarded(tokens, torch.int64)
        raise_words(
            library.emulated_fill(ctypes.byref(view), order, cu_pointer, ctypes.c_int64(tokens), indices_pointer)
        )
        check_indices()
        return indices, cu_seqlens, ranked

    return unpad


def guarded(size: int, dtype: torch.dtype) -> tuple[Tensor, ctypes.c_void_p, Callable[[], None]]:
    """[size], its address, and a function that raises where something was written beside it."""
    memory = torch.full((GUARD + size + GUARD,), UNTOUCHED, dtype=dtype)
    address = memory.data_ptr() + GUARD * memory.element_size()

    def check() -> None:
        if (memory[:GUARD] != UNTOUCHED).any() or (memory[GUARD + size :] != UNTOUCHED).any():
            raise RuntimeError("written beside the output")

    return memory[GUARD : GUARD + size], ctypes.c_void_p(address), check


def raise_words(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


@pytest.fixture(scope="module")
def emulated(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Unpad:
    return compile_emulated(ROOT / "csrc", compiler, tmp_path_factory.mktemp("emulated") / "unpad.so")


def problem(unpad: Unpad, mask: Tensor, order: int) -> str:
    """ "" or what is wrong with the result"""
    try:
        found = unpad(mask, order, 0), unpad(mask, order, 5), unpad(mask, order, -3)
    except RuntimeError as error:
        return str(error)
    expected_indices, *expected = expected_unpad(mask)
    wanted = expected_indices, torch.cat([expected_indices, torch.full((5,), -1)]), expected_indices[:-3]
    for (indices, *others), right in zip(found, wanted, strict=True):
        for name, ours, theirs in zip(("cu_seqlens", "order"), others, expected, strict=True):
            if not torch.equal(ours, theirs):
                return f"{name} differ"
        if not torch.equal(indices, right):
            return "indices differ"
    return ""


@pytest.mark.parametrize("order", [0, 1], ids=["first warp first", "last warp first"])
@pytest.mark.parametrize("case", CASES)
def test_cases(emulated: Unpad, case: str, order: int) -> None:
    assert problem(emulated, CASES[case], order) == ""


BARRIER = "  __syncthreads();\n"
PLANTED = {
    "no barrier before the warps' sums are read": (f"= inclusive;\n{BARRIER}", "= inclusive;\n"),
    "no barrier after the warps' sums are scanned": (f"lane], lane);\n{BARRIER}", "lane], lane);\n"),
    "a barrier of one warp": (
        "  if (warp == 0) warp_sums",
        "  if (warp == 3) __syncthreads();\n  if (warp == 0) warp_sums",
    ),
    "a shuffle that a lane skips": ("const int64_t other =", "const int64_t other = lane == 9 ? 0 :"),
    "the first lanes add what they should not": ("if (lane >= distance) sum", "sum"),
    "the warps before are forgotten": ("(warp > 0 ? warp_sums[warp - 1] : 0)", "0"),
    "shares rounded down": ("(rows + kScanThreads - 1) / kScanThreads", "rows / kScanThreads"),
    "the last shares run over the end": ("first + share < rows ? first + share : rows", "first + share"),
    "no zero in front": ("if (thread == 0) cu_seqlens[0] = 0;", ""),
    "no barrier before the lengths are compared": (f": -1;  // behind all that there are\n  {BARRIER}", ": -1;\n"),
    "no barrier before the lengths are overwritten": (
        f"    }}\n  {BARRIER}  }}\n  if (row < rows) order",
        "    }\n  }\n  if (row < rows) order",
    ),
    "equal lengths in any order": ("start + i < row", "false"),
    "more tokens than there are not marked": ("indices[i] = -1;", ";"),
    "fewer tokens than there are written on": (" && mine < tokens", ""),
    "rows behind the last are counted": ("if (row >= rows) return;", ""),
    "columns behind the last are read": ("column < columns && ", ""),
    "the column's stride is forgotten": ("row[column * stride]", "row[column]"),
    "32-bit row offsets": ("mask += row * row_stride;", "mask += static_cast<unsigned>(row * row_stride);"),
    "the sign of zero counts": ("& keep) != 0", "| 0 * keep) != 0"),
    "a lane counts itself": ("(1u << threadIdx.x) - 1", "(2u << threadIdx.x) - 1"),
    "every step is a full warp": ("place += __popc(real);", "place += kWarp;"),
    "columns not numbered through": ("row * columns + start", "row * columns + start % 256"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug: str, compiler: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda/unpad.cu"
    right, wrong = PLANTED[bug]
    assert right in source.read_text()
    once = bug.startswith("rows behind")  # in the second kernel this bug would write anywhere
    source.write_text(source.read_text().replace(right, wrong, 1 if once else -1))
    unpad = compile_emulated(tmp_path / "csrc", compiler, tmp_path / "unpad.so")
    assert any(problem(unpad, mask, order) for mask in CASES.values() for order in (0, 1))
