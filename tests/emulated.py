"""The CUDA kernels on the CPU: csrc/ops.cpp and csrc/cuda/ unchanged, compiled over emulator/cuda_runtime.h."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from fastbert import native

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests/emulator"
FLAGS = "-O1 -fPIC -fvisibility=hidden -DFASTBERT_CUDA -DFASTBERT_EMULATED -Wall -Wno-unknown-pragmas -Wno-sign-compare"


@functools.cache
def setup_py() -> ModuleType:
    """setup.py as a module: where it finds compiler and torch."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def is_here() -> bool:
    """Whether there is what the kernels are compiled with."""
    return setup_py().find_torch() is not None and setup_py().find_compiler() is not None


@functools.cache
def load() -> None:
    """Backend "cuda" runs on CPU tensors in this process from now on, where it is asked for."""
    native.load_emulated(built(setup_py().find_torch(), setup_py().find_compiler()))


def built(torch: Path, compiler: str) -> Path:
    """The library, compiled if it was not from these sources, two files at a time."""
    includes = ["-I", str(EMULATOR), "-I", str(ROOT / "csrc"), "-isystem", str(torch / "include")]
    more = os.environ.get("CXXFLAGS", "").split()  # test_sanitizers.py's
    command = [compiler, *setup_py().CXX_FLAGS.replace("-O3", "").split(), *FLAGS.split(), *includes, *more]
    files = sorted([*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc/cuda").glob("*.*"), *EMULATOR.glob("*.h")])
    total = hashlib.sha256(" ".join([*command, (torch / "version.py").read_text()]).encode())
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    target = ROOT / ".cache/emulated" / f"{total.hexdigest()[:16]}.so"
    if target.exists():
        return target
    work = target.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True)
    sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]

    def compiled(source: Path) -> str:
        target = work / f"{source.stem}.o"
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = work / "library.so"
    subprocess.run([compiler, *more, "-shared", "-o", str(library), *objects, *libraries], check=True)
    library.replace(target)
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    return target
