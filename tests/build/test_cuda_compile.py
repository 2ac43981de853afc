"""Machine code: what nvcc made of csrc/cuda/ for every card keeps what benchmarks.compiled_cuda asks of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import compiled_cuda, sass
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
    sources, built = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}, proven.built_sources()
    assert {kernel.file for kernel in found} == {name for name in sources if proven.built_name(name, "cuda") in built}
    assert [failure for kernel in found for failure in kernel.failures] == []
    for file in ("add_layer_norm", "embed_layer_norm", "bias_gelu"):
        assert any(kernel.vectors for kernel in found if kernel.file == file)


@pytest.mark.parametrize("hashes", [("f07c4e49", "c50862dc"), ("40291537", "86420975")])
def test_a_kernel_is_named_by_its_file(hashes: tuple[str, str]) -> None:
    """Also where nvcc's hashes of the file happen to be digits alone, as one in 43 is."""
    mangled = "_ZN8fastbert4cuda52_GLOBAL__N__{}_19_embed_layer_norm_cu_{}9add_chunkINS0_4HalfEEEvPKf".format(*hashes)
    found = compiled_cuda.NAME.search(mangled)
    assert found is not None
    assert found.groups() == ("embed_layer_norm", "9", "add_chunkINS0_4HalfEEEvPKf")


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


def machine_code(source: str, arch: str, nvcc: str, setup_py: ModuleType, folder: Path) -> dict[str, tuple]:
    """Of each kernel its registers and its instructions."""
    cubin = folder / "kernel.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = [*setup_py.CXX_FLAGS.split(), f"-I{ROOT / 'csrc'}", target, "-cubin", "-o", str(cubin)]
    subprocess.run([nvcc, *flags, str(ROOT / "csrc/cuda" / source)], check=True)
    triton = Path(pytest.importorskip("triton").__file__).parent  # which brings the tool
    command = [str(triton / "backends/nvidia/bin/cuobjdump"), "-res-usage", "-sass", str(cubin)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", printed))
    functions = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", printed, flags=re.DOTALL)
    return {name: (int(registers[name]), sass.parse(text)) for name, text in functions}


ATTENTION_CARDS = ["80", "90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("86", "89", "100a", "120a"))]
TILES = re.compile(r"7forwardI\w+Li(\d+)ELi(\d)ELi(\d)E")  # dims, warps, tiles of 16 queries
BLOCKS = {(32, 4, 1): 3, (64, 4, 1): 3}  # what registers leave room for on a multiprocessor; of the others 2


@pytest.mark.parametrize("arch", ATTENTION_CARDS)
def test_attention_has_its_instructions(arch: str, setup_py: ModuleType, nvcc: str, tmp_path: Path) -> None:
    """Tensor cores, matrices from shared memory, copies and stores of 16 bytes; registers as declared, none spilled."""
    found = {}
    for name, (registers, code) in machine_code("attention.cu", arch, nvcc, setup_py, tmp_path).items():
        assert not [i for i in code if sass.is_spill(i)], name
        if not (tiles := TILES.search(name)):
            assert not sass.tensor_core(code), "fp32 is fp32"
            continue
        dims, warps, rows = found[name] = tuple(map(int, tiles.groups()))
        assert registers <= 65536 // (32 * warps * BLOCKS.get((dims, warps, rows), 2)) // 8 * 8
        names = [i.name for i in code]
        keys = 32 if dims == 128 else 64
        products = 2 * rows * (keys // 8) * (dims // 16)  # of a tile of keys
        assert names.count("HMMA.16816.F32.BF16" if "BFloat16" in name else "HMMA.16816.F32") == products
        loads = {kind: len([n for n in names if n[:5] == "LDSM." and f".{kind}." in n]) for kind in ("M88", "MT88")}
        assert loads == {"M88": (rows + keys // 16) * (dims // 16), "MT88": keys // 16 * (dims // 16)}
        assert [n for n in names if n.startswith("LDGSTS") and n.endswith("128")]
        assert [n for n in names if n.startswith("STG") and n.endswith("128")]
    assert len(found) == 12


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "90a")])
def test_attention_backward_spills_nothing(arch: str, setup_py: ModuleType, nvcc: str, tmp_path: Path) -> None:
    found = machine_code("attention_backward.cu", arch, nvcc, setup_py, tmp_path)
    assert len(found) == 18
    for name, (registers, code) in found.items():
        assert registers <= 255 and not [i for i in code if sass.is_spill(i)], name
