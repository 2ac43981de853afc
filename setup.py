"""Builds the one optional native library, fastbert/_native.so, from csrc/ with ninja.

C++ always when there is a compiler, CUDA where there is nvcc. What cannot be built is left out, the package installs
all the same, and fastbert/_native.json keeps the reason in words, and what was compiled, for fastbert. The
library stands on torch's stable ABI: it needs torch's headers, but neither a certain torch nor a certain Python.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import which
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUDA_ARCHS = ("75", "80", "86", "89", "90a", "100a", "120a")
CUDA_PTX_ARCH = "80"  # what later cards compile for themselves
CXX_FLAGS = "-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest torch served
# The instruction sets of csrc/isa.h that vector code is compiled for beside the baseline, each with all before it:
# their flags, and an instruction that the assembler must know.
ISAS = {
    "avx2": ("-mavx2 -mfma -mf16c", "vfmadd132ps %ymm0, %ymm0, %ymm0"),
    "avx512": ("-mavx512f -mavx512bw -mavx512vl -mavx512dq", "vpmullq %zmm0, %zmm0, %zmm0"),
    "avx512_bf16": ("-mavx512vnni -mavx512bf16", "vdpbf16ps %zmm0, %zmm0, %zmm0"),
}


def find_torch() -> Path | None:
    """The folder of the torch that the library is built for; pip's isolated builds see it only through purelib."""
    spec = find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    places.append(sysconfig.get_path("purelib") + "/torch")
    return next((Path(p) for p in places if Path(p, "include/torch/csrc/stable/library.h").is_file()), None)


def find_compiler() -> str | None:
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    return next((path for name in names if name and (path := which(name))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return which("nvcc", path=f"{home}/bin") if home else which("nvcc") or which("nvcc", path="/usr/local/cuda/bin")


def find_ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    return which("ninja", path=BIN_DIR) or which("ninja")


def gencode_flags(nvcc: str) -> str:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"sm_{arch.rstrip('a')}" in known]
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode arch=compute_{CUDA_PTX_ARCH},code=compute_{CUDA_PTX_ARCH}"])


def isa_flags(compiler: str) -> dict[str, str]:
    """The instruction sets that the compiler knows for this machine, each with its flags."""
    found, flags = dict[str, str](), ""
    for isa, (more, instruction) in ISAS.items():
        flags += f" {more}"
        command = [compiler, *flags.split(), "-x", "c++", "-", "-c", "-o", os.devnull]
        program = f'void f() {{ asm("{instruction}"); }}'
        if subprocess.run(command, input=program, capture_output=True, text=True).returncode:
            break
        found[isa] = flags.strip()
    return found


def is_vector_code(source: Path) -> bool:
    """Whether a file is compiled once per instruction set."""
    return '#include "vectors.h"' in source.read_text()


def ninja_file(target: Path, torch: Path, compiler: str, nvcc: str | None) -> str:
    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def shell(p: Path | str) -> str:
        return shlex.quote(str(p)).replace("$", "$$")

    cxx, csrc = shell(compiler), f"-I{shell(CSRC)}"
    cxx_flags = f"{CXX_FLAGS} -fPIC -fvisibility=hidden {csrc} -isystem {shell(torch)}/include"
    libraries = f"-L{shell(torch)}/lib {{x}}--no-as-needed -ltorch -ltorch_cpu -lc10"
    link = f"{cxx} -shared -o $out $in " + libraries.format(x="-Wl,")
    isas = isa_flags(compiler)
    cxx_flags += "".join(f" -DFASTBERT_{isa.upper()}" for isa in isas)
    cuda = ""
    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    if nvcc:
        sources += sorted(CSRC.glob("cuda/*.cu"))
        cxx_flags += " -DFASTBERT_CUDA"
        cuda = f"{shell(nvcc)} -ccbin {cxx}"
        link = f"{cuda} -shared -cudart static -Xlinker --exclude-libs=ALL -o $out $in "
        link += libraries.format(x="-Xlinker ")
        cuda += f" {CXX_FLAGS} -Xcompiler -fPIC,-fvisibility=hidden {csrc} {gencode_flags(nvcc)}"
    objects = {f"{source.parent.name}_{source.stem}.o": source for source in sources}
    rules = {"cpp": f"{cxx} {cxx_flags} $isa -MMD", "cu": f"{cuda} -MD"}
    lines = [f"rule link\n  command = {link}"]
    for suffix, command in rules.items():
        lines.append(f"rule {suffix}\n  command = {command} -MF $out.d -c $in -o $out\n  depfile = $out.d")
    lines += [f"build {name}: {source.suffix[1:]} {path(source)}" for name, source in objects.items()]
    for source in filter(is_vector_code, sources):
        for isa, flags in isas.items():
            name = f"{source.parent.name}_{source.stem}.{isa}.o"
            lines.append(f"build {name}: cpp {path(source)}\n  isa = {flags} -DFASTBERT_ISA={isa}")
            objects[name] = source
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_library(target: Path, work: Path, torch: Path, compiler: str, nvcc: str | None) -> str:
    """Runs ninja in `work`; returns "" or, in words, why there is no library at `target`."""
    ninja = find_ninja()
    if ninja is None:
        return "ninja was not found when fastbert was built"
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file(target, torch, compiler, nvcc))
    run = subprocess.run([ninja, "-C", str(work)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode == 0:
        return ""
    print(run.stdout, file=sys.stderr)
    errors = [line for line in run.stdout.splitlines() if "error" in line.lower()]
    return f"{'nvcc' if nvcc else compiler} failed when fastbert was built: {(errors or ['no message'])[0].strip()}"


def digests() -> dict[str, str]:
    """What the kernels are made of: "unpad cpu" → the digest by which fastbert/proven.json knows its sources."""
    spec = spec_from_file_location("fastbert_proven", ROOT / "fastbert/proven.py")
    assert spec is not None and spec.loader is not None
    proven = module_from_spec(spec)
    spec.loader.exec_module(proven)
    kernels = [(path.stem, path.parent.name) for path in [*CSRC.glob("cpu/*.cpp"), *CSRC.glob("cuda/*.cu")]]
    kernels = sorted([*kernels, *((name, part) for part in proven.MADE_OF for name in proven.MADE_OF[part])])
    return {proven.built_name(*kernel): proven.digest(*kernel) for kernel in kernels}


def build_library(target: Path, work: Path) -> dict[str, str]:
    """Builds what can be built; returns why the library and why its CUDA half is absent, "" for what is there."""
    target.unlink(missing_ok=True)
    torch, compiler, nvcc = find_torch(), find_compiler(), find_nvcc()
    absent = ""
    if not sys.platform.startswith("linux"):
        absent = "the native library is built on Linux only"
    elif torch is None:
        absent = "torch 2.11 or newer was not installed when fastbert was built; install fastbert again"
    elif compiler is None:
        absent = "no C++ compiler (g++, c++ or clang++) was found when fastbert was built"
    if absent:
        return {"library": absent, "cuda": absent}
    no_cuda = "nvcc was not found when fastbert was built"
    if nvcc is not None:
        no_cuda = compile_library(target, work / "cuda", torch, compiler, nvcc)
    failed = compile_library(target, work / "cpp", torch, compiler, None) if no_cuda else ""
    return {"library": failed, "cuda": failed or no_cuda}


class BuildNative(build_ext):
    """build_ext for a library that does not know Python: _native.so, and _native.json beside it."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = digests()  # before the compilers read them
        absent = build_library(target, Path(self.build_temp).resolve())
        built: dict[str, Any] = {**absent, "sources": sources}
        target.with_suffix(".json").write_text(json.dumps(built, indent=2) + "\n")
        for part, reason in absent.items():
            print(f"fastbert: native {part}: {reason or 'built'}")

    def copy_extensions_to_source(self) -> None:
        for built, source in self._pairs():
            source.unlink(missing_ok=True)
            if built.exists():
                self.copy_file(str(built), str(source))

    def get_outputs(self) -> list[str]:
        return [str(built) for built, _ in self._pairs() if built.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {str(built): str(source) for built, source in self._pairs() if built.exists() and self.inplace}

    def _pairs(self) -> list[tuple[Path, Path]]:
        """Where the library and its reasons are built, and where they belong in the source tree."""
        built = Path(self.build_lib, self.get_ext_filename("fastbert._native"))
        source = ROOT / self.get_ext_filename("fastbert._native")
        return [(built, source), (built.with_suffix(".json"), source.with_suffix(".json"))]


class Wheel(bdist_wheel):
    """One wheel a platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.*"))
    setup(
        packages=[*find_packages(include=["fastbert", "fastbert.*"]), "fastbert.kernels"],
        package_dir={"fastbert.kernels": "kernels"},
        package_data={"fastbert": ["proven.json"], "fastbert.kernels": ["README.md"]},
        ext_modules=[Extension("fastbert._native", sources, optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
