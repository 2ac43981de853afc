"""The CUDA kernels on the CPU: csrc/ops_cuda.cpp and csrc/cuda/ unchanged, compiled over emulator/cuda_runtime.h."""

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
NAME = "fastbert_emulated"
BUILT = os.environ.get("FASTBERT_EMULATED", "")  # a library that was built elsewhere, beside another torch
FLAGS = "-O1 -fPIC -fvisibility=hidden -DFASTBERT_CUDA -Wall -Wno-unknown-pragmas -Wno-sign-compare"


@functools.cache
def setup_py() -> ModuleType:
    """setup.py as a module, without running setup(): where it finds compiler and torch, what it builds."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def is_here() -> bool:
    """Whether there is a library, or its sources, which an installed fastbert lacks, and what compiles them."""
    if BUILT:
        return True
    if not (ROOT / "csrc").is_dir():
        return False
    return setup_py().find_torch() is not None and setup_py().find_compiler() is not None


@functools.cache
def load() -> None:
    """Backend "cuda" runs on CPU tensors in this process from now on, where it is asked for."""
    native.load_emulated(Path(BUILT) if BUILT else built(), NAME)


def built(csrc: Path = ROOT / "csrc", name: str = NAME, *options: str) -> Path:
    """The library of these sources under a name, compiled if it was not yet, two files at a time."""
    torch, compiler = setup_py().find_torch(), setup_py().find_compiler()
    includes = ["-I", str(EMULATOR), "-I", str(csrc), "-isystem", str(torch / "include")]
    named = [f"-DFASTBERT_EMULATED={name}", *options]
    more = os.environ.get("CXXFLAGS", "").split()  # test_sanitizers.py's
    command = [compiler, *setup_py().CXX_FLAGS.replace("-O3", "").split(), *FLAGS.split(), *named, *more, *includes]
    files = sorted([*csrc.glob("*.*"), *csrc.glob("cuda/*.*"), *EMULATOR.glob("*.h")])
    about = [compiler, name, FLAGS, *more, (torch / "version.py").read_text()]
    total = hashlib.sha256(" ".join(about).encode())
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    target = ROOT / ".cache/emulated" / f"{total.hexdigest()[:16]}.so"
    if target.exists():
        return target
    work = target.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True)
    sources = sorted([*csrc.glob("*.cpp"), *csrc.glob("cuda/*.cu")])

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
