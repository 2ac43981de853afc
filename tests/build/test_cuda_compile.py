"""nvcc compiles every kernel for every card that setup.py names, none spills, and attention has its instructions."""

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import sass
from tests.build.conftest import ROOT

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compile_report(source: Path, setup_py: ModuleType, nvcc: str, *options: str) -> dict[tuple[str, str], int]:
    """Bytes spilled by each (kernel, card)."""
    flags = [*setup_py.CXX_FLAGS.split(), *setup_py.gencode_flags(nvcc).split(), f"-I{ROOT / 'csrc'}", *options]
    command = [nvcc, *flags, "--threads", "2", "-Xptxas", "-v", "-c", str(source), "-o", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spilled = {}
    for line in run.stderr.splitlines():
        if kernel := KERNEL.search(line):
            last = (kernel[1], kernel[2])
        elif spills := SPILLS.search(line):
            spilled[last] = int(spills[1]) + int(spills[2])
    return spilled


LONG = ("attention.cu", "attention_backward.cu")  # to compile: two cards below are quick


@pytest.mark.parametrize(
    "source",
    [pytest.param(source, marks=[pytest.mark.slow] * (source.name in LONG)) for source in SOURCES],
    ids=[source.name for source in SOURCES],
)
def test_no_kernel_spills_on_any_card(source: Path, setup_py: ModuleType, nvcc: str) -> None:
    spilled = compile_report(source, setup_py, nvcc)
    kernels = {kernel for kernel, _ in spilled}
    assert kernels
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    cards = [arch for arch in setup_py.CUDA_ARCHS if f"sm_{arch.rstrip('a')}\n" in known]
    assert set(spilled) == {(kernel, card) for kernel in kernels for card in cards}
    assert not {which: size for which, size in spilled.items() if size}


def test_a_spill_would_be_seen(setup_py: ModuleType, nvcc: str) -> None:
    assert any(compile_report(ROOT / "csrc/cuda/unpad.cu", setup_py, nvcc, "--maxrregcount=16").values())


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


CARDS = ["80", "90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("86", "89", "100a", "120a"))]
TILES = re.compile(r"7forwardI\w+Li(\d+)ELi(\d)ELi(\d)E")  # dims, warps, tiles of 16 queries
BLOCKS = {(32, 4, 1): 3, (64, 4, 1): 3}  # what registers leave room for on a multiprocessor; of the others 2


@pytest.mark.parametrize("arch", CARDS)
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
