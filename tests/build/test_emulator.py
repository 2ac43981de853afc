"""The emulator of CUDA on the CPU: exchanges between lanes, halves of a warp, shared memory poisoned."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from tests.build.conftest import ROOT


@pytest.fixture(scope="module")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    emulator, target = ROOT / "tests/emulator", tmp_path_factory.mktemp("emulator") / "own.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, f"-I{emulator}", str(emulator / "own.cpp"), "-o", str(target)], check=True)
    found = ctypes.CDLL(str(target))
    for name in ("run_shuffles", "run_halves", "run_shared", "run_with_much_memory"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


def test_exchanges(library: ctypes.CDLL) -> None:
    out = torch.full((5, 32), -1, dtype=torch.int32)
    assert library.run_shuffles(ctypes.c_void_p(out.data_ptr())) is None
    lanes = list(range(32))
    assert out[0].tolist() == [0, *lanes[:-1]]
    assert out[1].tolist() == [*lanes[2:], 30, 31]
    assert out[2].tolist() == [lane ^ 5 for lane in lanes]
    assert out[3].tolist() == [3] * 32 and out[4].tolist() == [16] * 32


def test_halves_of_a_warp(library: ctypes.CDLL) -> None:
    out = torch.full((32,), -1, dtype=torch.int32)
    assert library.run_halves(ctypes.c_void_p(out.data_ptr())) is None
    assert out.tolist() == [sum(range(16))] * 16 + [3] * 16


def test_shared_memory_is_poisoned_before_each_block(library: ctypes.CDLL) -> None:
    """Fixed and dynamic, in a template too; no block sees what another one wrote."""
    out = torch.zeros(2, 2)
    assert library.run_shared(ctypes.c_void_p(out.data_ptr()), 3) is None
    assert out[0].isnan().all() and out[1].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("size", "asks", "words"),
    [
        (48 << 10, False, None),
        ((48 << 10) + 1, False, b"invalid argument"),
        (227 << 10, True, None),
        ((227 << 10) + 1, True, b"asked for too much"),
    ],
)
def test_dynamic_shared_memory_is_limited(library: ctypes.CDLL, size: int, asks: bool, words: bytes | None) -> None:
    out = torch.zeros(2, 2)
    assert library.run_with_much_memory(ctypes.c_void_p(out.data_ptr()), size, asks) == words
