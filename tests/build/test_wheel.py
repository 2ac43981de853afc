"""Building with, without and with half a toolchain, on Linux and elsewhere: one wheel a platform, and what it holds."""

import json
import shutil
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from pytest import MonkeyPatch

from tests.build.conftest import KERNEL, OFFLINE, PIP, TELL, python

HERE = Path(__file__).parent
PLATFORM = sysconfig.get_platform().replace("-", "_")
BUILD_WHEEL = "from setuptools import build_meta; build_meta.build_wheel('..')"
BUILD_SDIST = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"

ON_OTHER_SYSTEMS = """
import gc
from fastbert.cli import main
from fastbert.limits import peak_memory
assert peak_memory(gc.collect) is None
sys.argv[1:] = ["doctor", "--json", "-"]
main()
"""


def unpacked(folder: Path, platform: str = PLATFORM) -> Path:
    """The folder of the contents of the one wheel in `folder`, which serves every Python."""
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"fastbert_kernels-0.1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def unpacked_wheel(source: Path, to: Path, **variables: str) -> Path:
    shutil.copytree(source, to / "tree")
    python(*PIP, "wheel", *OFFLINE, "-w", str(to), ".", cwd=to / "tree", **variables)
    return unpacked(to)


def files(folder: Path) -> set[str]:
    """All but what Python compiled where a test ran it inside the folder."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def check_contents(site: Path, source: Path) -> None:
    packages = {path.name for path in site.iterdir()}
    assert packages == {"fastbert", "fastbert_kernels-0.1.0.dist-info"}
    kernels = {f"kernels/{name}" for name in files(source / "kernels")}
    assert files(site / "fastbert") == files(source / "fastbert") | kernels | {"_native.so", "_native.json"}
    metadata = site / "fastbert_kernels-0.1.0.dist-info"
    assert "fastbert = fastbert.cli:main" in (metadata / "entry_points.txt").read_text()
    assert "Apache License" in (metadata / "licenses/LICENSE").read_text()


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    nothing = str(tmp_path / "bin")
    site = unpacked_wheel(source, tmp_path, PATH=nothing, CUDA_HOME=nothing)
    assert not (site / "fastbert/_native.so").exists()
    said = python("-c", TELL, cwd=site)
    assert said == "False False no C++ compiler (g++, c++ or clang++) was found when fastbert was built"


def test_without_nvcc(source: Path, tmp_path: Path, compiler: str) -> None:
    site = unpacked_wheel(source, tmp_path, CUDA_HOME=str(tmp_path))
    assert python("-c", TELL, cwd=site) == "True False nvcc was not found when fastbert was built"
    check_contents(site, source)
    other = tmp_path / "other"
    (other / "kernels").mkdir(parents=True)  # as the index's project of that name is installed
    (other / "kernels/__init__.py").write_text("theirs = True\n")
    assert python("-c", KERNEL, cwd=other, PYTHONPATH=str(site)) == f"{site}/fastbert/kernels/probe.py False"
    assert python("-c", "import fastbert, kernels; print(kernels.theirs)", cwd=other, PYTHONPATH=str(site)) == "True"


@pytest.mark.slow
def test_the_whole_library_beside_any_torch(source: Path, tmp_path: Path, nvcc: str, compiler: str) -> None:
    """With nvcc, also where torch is the CPU's: the library's CUDA half is built, and the whole loads."""
    site = unpacked_wheel(source, tmp_path)
    assert python("-c", TELL, cwd=site) == "True True"
    check_contents(site, source)


def test_without_torch(setup_py: ModuleType, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "find_torch", lambda: None)
    absent = setup_py.build_library(tmp_path / "_native.so", tmp_path / "work")
    reason = "torch 2.11 or newer was not installed when fastbert was built; install fastbert again"
    assert absent == {"library": reason, "cuda": reason}


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


def test_an_sdist_holds_every_source(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    name = python("-c", BUILD_SDIST, cwd=tmp_path / "tree").splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert files(source) <= held, files(source) - held
    assert not [name for name in held if "_native." in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "platform"), [("Darwin", "macosx-11.0-arm64"), ("Windows", "win32")], ids=["macOS", "Windows"]
)
def test_a_machine_that_looks_like(system: str, platform: str, source: Path, tmp_path: Path) -> None:
    """A wheel built there, a model that runs there on both paths, the doctor: no library, no Triton, and why."""
    pretend = [str(HERE / "other_system.py"), system]
    shutil.copytree(source, tmp_path / "tree")
    python(*pretend, BUILD_WHEEL, "setuptools.build_meta", cwd=tmp_path / "tree", _PYTHON_HOST_PLATFORM=platform)
    site = unpacked(tmp_path, platform.replace("-", "_").replace(".", "_"))
    assert not (site / "fastbert/_native.so").exists()
    before = ["torch", "transformers.modeling_utils", "typer", "rich.console"]
    code = (HERE / "use.py").read_text() + ON_OTHER_SYSTEMS
    said, _, examined = python(*pretend, code, *before, cwd=tmp_path, PYTHONPATH=str(site)).partition("\n")
    used, examined = json.loads(said), json.loads(examined)
    reason = "the native library is built on Linux only"
    assert (used["native"], used["triton"], used["parity"]) == (reason, "nowhere", True)
    assert used["forwards"] == {"": 1, "attentions were asked for": 1}
    assert examined["triton"]["reason"] == "triton is not installed"
    assert examined["provenance"]["machine"]["system"].startswith(system)
    assert reason in str(examined["native"])
