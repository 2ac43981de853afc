"""csrc/cpu/vectors.h and the build of vector code: conversions by every instruction set; functions that none share."""

import ctypes
import re
import shlex
import subprocess
from pathlib import Path
from shutil import which
from types import ModuleType

import pytest
import torch

from fastbert import native
from tests.build.conftest import ROOT

CONVERT = """
#include "vectors.h"
namespace fastbert::cpu::FASTBERT_ISA {
template <typename T>
void widen(const void* from, float* to, int64_t count) {
  for_columns(count, [&](int64_t i, auto n) { store(to + i, load(static_cast<const T*>(from) + i, n), n); });
}
template <typename T>
void narrow(const float* from, void* to, int64_t count) {
  for_columns(count, [&](int64_t i, auto n) { store(static_cast<T*>(to) + i, load(from + i, n), n); });
}
}  // namespace fastbert::cpu::FASTBERT_ISA
using namespace fastbert::cpu::FASTBERT_ISA;
extern "C" void widen_float16(const void* from, float* to, int64_t count) { widen<Half>(from, to, count); }
extern "C" void widen_bfloat16(const void* from, float* to, int64_t count) { widen<BFloat16>(from, to, count); }
extern "C" void narrow_float16(const float* from, void* to, int64_t count) { narrow<Half>(from, to, count); }
extern "C" void narrow_bfloat16(const float* from, void* to, int64_t count) { narrow<BFloat16>(from, to, count); }
"""
KINDS = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", params=native.ISAS)
def conversions(
    request: pytest.FixtureRequest, setup_py: ModuleType, compiler: str, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The conversions compiled for an instruction set that this compiler knows and this CPU has."""
    flags = {"baseline": ""} | setup_py.isa_flags(compiler)
    here = native.ISAS[: native.ISAS.index(native.isa()) + 1] if native.load().available else ()
    if request.param not in flags or request.param not in here:
        pytest.skip(f"no {request.param} here")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "convert.cpp").write_text(CONVERT)
    command = [compiler, "-std=c++17", "-O3", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cpu'}"]
    command += [*flags[request.param].split(), f"-DFASTBERT_ISA={request.param}"]
    subprocess.run([*command, str(folder / "convert.cpp"), "-o", str(folder / "convert.so")], check=True)
    return ctypes.CDLL(str(folder / "convert.so"))


def converted(library: ctypes.CDLL, name: str, values: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    found = torch.empty(len(values) + 1, dtype=to)
    found[-1] = 42  # must stay: nothing is written behind the last
    getattr(library, name)(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(found.data_ptr()), ctypes.c_int64(len(values))
    )
    assert found[-1] == 42
    return found[:-1]


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, and NaN where there is NaN."""
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    wrong = (ours.view(bits) != expected.view(bits)) & ~(ours.isnan() & expected.isnan())
    assert not wrong.any(), (ours[wrong][:4], expected[wrong][:4])


def name_of(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_all_values_of_16_bits(conversions: ctypes.CDLL, kind: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(kind)
    for some in (values, values[3:]):  # whole vectors, and some elements behind the last
        wide = converted(conversions, f"widen_{name_of(kind)}", some, torch.float32)
        assert_same(wide, some.float())
        assert_same(converted(conversions, f"narrow_{name_of(kind)}", wide, kind), some)


def dense_floats() -> torch.Tensor:
    """Floats of every exponent and sign: each 13th and 16th bit's ties, their neighbours, and 4096 draws a binade."""
    exponents = torch.arange(256, dtype=torch.int64)[:, None] << 23
    steps = torch.arange(0, 1 << 10, dtype=torch.int64)
    ties = torch.cat([(steps << 13) + (1 << 12), steps[: 1 << 7] << 16, (steps[: 1 << 7] << 16) + (1 << 15)])
    near = torch.cat([ties - 1, ties, ties + 1]).clamp(0, (1 << 23) - 1)
    drawn = torch.randint(1 << 23, (4096,), generator=torch.Generator().manual_seed(0))
    mantissas = torch.cat([near, drawn, torch.tensor([0, 1, (1 << 23) - 1])])
    bits = (exponents + mantissas).flatten()
    return torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_rounding_to_16_bits(conversions: ctypes.CDLL, kind: torch.dtype) -> None:
    """To the nearest, ties to even, as torch: subnormals, what overflows, infinities; NaN stays NaN."""
    values = dense_floats()
    assert values.isnan().any() and values.isinf().any() and (values == 0).any()
    assert_same(converted(conversions, f"narrow_{name_of(kind)}", values, kind), values.to(kind))


def test_files_compiled_for_several_instruction_sets_share_no_function(
    setup_py: ModuleType, compiler: str, tmp_path: Path
) -> None:
    """A function that the linker takes from one of them for all would run on CPUs that lack its instructions."""
    nm = which("nm") or pytest.skip("no nm on this machine")
    files = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if setup_py.is_vector_code(path)]
    assert len(files) >= 2
    for isa, flags in setup_py.isa_flags(compiler).items():
        for source in files:
            command = [compiler, "-std=c++17", "-O0", "-fPIC", f"-I{ROOT / 'csrc'}", *flags.split()]  # inlines nothing
            command += [f"-DFASTBERT_ISA={isa}", f"-DFASTBERT_{isa.upper()}"]
            subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "object.o")], check=True)
            lines = subprocess.run([nm, "-C", str(tmp_path / "object.o")], capture_output=True, text=True, check=True)
            defined = re.findall(r"^\w+ ([A-Zuvw]) (.*)$", lines.stdout, re.MULTILINE)
            shared = [name for kind, name in defined if not name.startswith(f"fastbert::cpu::{isa}::") or kind != "T"]
            assert defined and not shared, (source.name, isa)


def test_a_compiler_that_lacks_an_instruction_set(setup_py: ModuleType, compiler: str, tmp_path: Path) -> None:
    """What it does not know is left out, with all that need it; the rest is built."""
    known = setup_py.isa_flags(compiler)
    if "avx512" not in known:
        pytest.skip("this compiler knows too little")
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *avx512f*) exit 1;; esac\nexec {shlex.quote(compiler)} "$@"\n')
    old.chmod(0o755)
    assert setup_py.isa_flags(str(old)) == {"avx2": known["avx2"]}
    rules = setup_py.ninja_file(tmp_path / "_native.so", Path("torch"), str(old), None)
    assert "-DFASTBERT_AVX2" in rules and "cpu_add_layer_norm.avx2.o" in rules
    assert "AVX512" not in rules and "avx512" not in rules


def test_an_old_assembler(setup_py: ModuleType, compiler: str, tmp_path: Path) -> None:
    """A compiler that takes the flags before an assembler that does not know the instructions."""
    known = setup_py.isa_flags(compiler)
    if "avx512_bf16" not in known:
        pytest.skip("this compiler knows too little")
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\nif grep -q vdpbf16ps; then exit 1; fi\nexec {shlex.quote(compiler)} "$@"\n')
    old.chmod(0o755)
    assert list(setup_py.isa_flags(str(old))) == ["avx2", "avx512"]
