"""Machine code: what nvcc made of csrc/cuda/ for every card keeps what benchmarks.compiled_cuda asks of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import compiled_cuda
from fastbert import native, proven
from tests.build.conftest import ROOT

QUICK = ("80", "90a")
CARDS = [arch if arch in QUICK else pytest.param(arch, marks=pytest.mark.slow) for arch in compiled_cuda.ARCHS]


@pytest.fixture(scope="module")
def tools() -> Path:
    return compiled_cuda.tools() or pytest.skip("Triton, whose package brings cuobjdump, is not installed")


def test_the_cards_are_those_of_the_build(setup_py: ModuleType) -> None:
    assert setup_py.CUDA_ARCHS == compiled_cuda.ARCHS


@pytest.mark.parametrize("arch", CARDS)
def test_every_kernel_on_every_card(arch: str, tools: Path) -> None:
    """No spill in a loop, little stack, 128-bit accesses where they are promised."""
    if not native.load().has_cuda:
        pytest.skip(native.load().cuda_reason)
    found = list(compiled_cuda.kernels(native.LIBRARY, arch, tools))
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert {kernel.file for kernel in found} == sources & {name.split()[0] for name in proven.built_sources()}
    assert [failure for kernel in found for failure in kernel.failures] == []
    for file in ("add_layer_norm", "embed_layer_norm", "bias_gelu"):
        assert any(kernel.vectors for kernel in found if kernel.file == file)


def compiled(source: Path, tools: Path, setup_py: ModuleType, nvcc: str, *options: str) -> list[compiled_cuda.Kernel]:
    """The kernels of one file, compiled for sm_80 alone."""
    target = source.with_suffix(".cubin")
    flags = [*setup_py.CXX_FLAGS.split(), f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}", *options]
    subprocess.run([nvcc, *flags, "-arch=sm_80", "-cubin", str(source), "-o", str(target)], check=True)
    return list(compiled_cuda.kernels(target, "80", tools))


def test_what_is_not_kept_would_be_seen(tools: Path, setup_py: ModuleType, nvcc: str, tmp_path: Path) -> None:
    """Too few registers for a loop; an array on the stack; a kernel that promises 128-bit accesses and has none."""
    source = tmp_path / "wrong.cu"
    source.write_text("""
#include <cuda_runtime.h>
namespace {
template <bool kVector>
__global__ void copy(const float* from, float* to, const int* order, int n) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = from[i];
  for (int i = 0; i < n; ++i) to[i] = kept[order[i]];
}
}
void launch(const float* from, float* to, const int* order) { copy<true><<<1, 1>>>(from, to, order, 9); }
""")
    (kernel,) = compiled(source, tools, setup_py, nvcc)
    words = "; ".join(kernel.failures)
    for expected in ("in an innermost loop", "256 bytes of stack", "no 128-bit load", "no 128-bit store"):
        assert expected in words
