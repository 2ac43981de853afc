"""nvcc compiles every kernel for every card that setup.py names, and none of them spills."""

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

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


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
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
