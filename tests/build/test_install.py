"""Installing with, without and with half a toolchain; what a wheel holds; fastbert.kernels in every kind of install."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from pytest import MonkeyPatch

from tests.build.conftest import ROOT

PIP = ["-m", "pip", "--disable-pip-version-check", "-q"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]
TELL = "from fastbert.native import load; n = load(); print(n.available, n.has_cuda, n.reason or n.cuda_reason)"
KERNEL = "import sys, fastbert.kernels.probe as p; print(p.PLACE, 'kernels' in sys.modules)"


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, with one kernel in it and nothing built."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "fastbert", tree / "fastbert", ignore=shutil.ignore_patterns("__pycache__", "_native.*"))
    for folder in ("csrc", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tree)
    (tree / "kernels/probe.py").write_text("PLACE = __file__\n")
    return tree


def python(*arguments: str, cwd: Path, executable: str = sys.executable, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CXX", "PYTHONPATH")}
    environment |= {"HF_HUB_OFFLINE": "1"} | variables
    run = subprocess.run([executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def unpacked_wheel(tree: Path, to: Path, **variables: str) -> Path:
    """Builds a wheel of a copy of `tree` (builds leave files behind) and returns the folder of its contents."""
    shutil.copytree(tree, to / "tree")
    python(*PIP, "wheel", *OFFLINE, "-w", str(to), ".", cwd=to / "tree", **variables)
    (wheel,) = to.glob("*.whl")
    assert wheel.name == f"fastbert_kernels-0.1.0-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to / "site")
    return to / "site"


def test_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    nothing = str(tmp_path / "bin")
    site = unpacked_wheel(tree, tmp_path, PATH=nothing, CUDA_HOME=nothing)
    assert not (site / "fastbert/_native.so").exists()
    said = python("-c", TELL, cwd=site)
    assert said == "False False no C++ compiler (g++, c++ or clang++) was found when fastbert was built"


def test_without_nvcc(tree: Path, tmp_path: Path, compiler: str) -> None:
    site = unpacked_wheel(tree, tmp_path, CUDA_HOME=str(tmp_path))
    assert python("-c", TELL, cwd=site) == "True False nvcc was not found when fastbert was built"
    check_contents(site)
    other = tmp_path / "other"
    (other / "kernels").mkdir(parents=True)  # as the index's project of that name is installed
    (other / "kernels/__init__.py").write_text("theirs = True\n")
    assert python("-c", KERNEL, cwd=other, PYTHONPATH=str(site)) == f"{site}/fastbert/kernels/probe.py False"
    assert python("-c", "import fastbert, kernels; print(kernels.theirs)", cwd=other, PYTHONPATH=str(site)) == "True"


def check_contents(site: Path) -> None:
    packages = {path.name for path in site.iterdir()}
    assert packages == {"fastbert", "fastbert_kernels-0.1.0.dist-info"}
    for file in ("py.typed", "_native.so", "_native.json", "kernels/probe.py", "kernels/README.md", "ops/registry.py"):
        assert (site / "fastbert" / file).is_file(), file
    assert not list(site.rglob("*.c[pu]*"))
    assert "fastbert = fastbert.cli:main" in (site / "fastbert_kernels-0.1.0.dist-info/entry_points.txt").read_text()


def test_a_compiler_that_fails(setup_py: ModuleType, tmp_path: Path, compiler: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "CXX_FLAGS", "-std=c++17 -include missing.h")
    absent = setup_py.build_library(tmp_path / "_native.so", tmp_path / "work")
    assert "missing.h" in absent["library"] and "failed when fastbert was built" in absent["library"]
    assert not (tmp_path / "_native.so").exists()


def test_nvcc_that_fails(setup_py: ModuleType, tmp_path: Path, compiler: str, monkeypatch: MonkeyPatch) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho error: too new a compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: str(broken))
    absent = setup_py.build_library(tmp_path / "_native.so", tmp_path / "work")
    assert absent == {"library": "", "cuda": "nvcc failed when fastbert was built: error: too new a compiler"}
    assert (tmp_path / "_native.so").exists()


def test_kernels_in_a_checkout_that_is_not_installed(tree: Path) -> None:
    assert python("-c", KERNEL, cwd=tree) == f"{tree}/kernels/probe.py False"


@pytest.mark.slow
@pytest.mark.parametrize("tools", ["a compiler", "no compiler"])
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(mode: str, tools: str, tree: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    venv.create(tmp_path / "venv", symlinks=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    executable = str(tmp_path / "venv/bin/python")
    tell_purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = python("-c", tell_purelib, cwd=tmp_path, executable=executable)
    (Path(purelib) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the build's tools
    path = str(elsewhere)
    if tools == "a compiler":
        request.getfixturevalue("compiler")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    strict = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    install = [*PIP, "install", *OFFLINE, *strict, "-e", "."]
    python(*install, cwd=tmp_path / "tree", executable=executable, PATH=path, CUDA_HOME=str(elsewhere))
    place, shadows = python("-c", KERNEL, cwd=elsewhere, executable=executable).split()
    assert (Path(place).resolve(), shadows) == (tmp_path / "tree/kernels/probe.py", "False")
    said = python("-c", TELL, cwd=elsewhere, executable=executable)
    assert said.startswith("True False nvcc was not" if tools == "a compiler" else "False False no C++ compiler")


@pytest.mark.slow
def test_the_whole_library(tree: Path, tmp_path: Path, nvcc: str, compiler: str) -> None:
    site = unpacked_wheel(tree, tmp_path)
    assert python("-c", TELL, cwd=site) == "True True"
    check_contents(site)
