"""Every way to install fastbert, beside every combination of the index's `kernels` and Triton: what a program finds."""

import os
import shutil
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from json import loads
from pathlib import Path

import pytest
import torch

from tests.build.conftest import KERNEL, OFFLINE, PIP, ROOT, TELL, python

USE = (Path(__file__).parent / "use.py").read_text()
STRICT = ["--config-settings", "editable_mode=strict"]
WAYS = {  # what pip is given, in a copy of the repository
    "wheel": ["install", *OFFLINE, "."],
    "wheel, built in isolation": ["install", "--no-deps", "."],  # fetches setuptools and ninja
    "sdist": ["install", *OFFLINE, "fastbert_kernels-0.1.0.tar.gz"],
    "editable, lenient": ["install", *OFFLINE, "-e", "."],
    "editable, strict": ["install", *OFFLINE, *STRICT, "-e", "."],
    "uninstalled": [],  # Python runs in the repository
}
NOT_BUILT = "the native library was not built: fastbert runs from a folder in which it was not installed"


@dataclass(frozen=True)
class Install:
    """A Python, the folder to run it in, and the folder that is fastbert.kernels there."""

    python: str
    cwd: Path
    kernels: Path


def make_venv(folder: Path) -> tuple[str, Path]:
    """A virtual environment that has the packages of this one, without its fastbert: its Python and site-packages."""
    venv.create(folder, symlinks=True)
    executable = str(folder / "bin/python")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "torch").symlink_to(Path(torch.__file__).parent)  # where an isolated build looks for it
    return executable, site


@pytest.fixture(scope="module")
def install(source: Path, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Install]:
    """install(way): fastbert installed in one of the WAYS, without nvcc; each once."""

    @cache
    def make(way: str) -> Install:
        folder = tmp_path_factory.mktemp("install")
        executable, site = make_venv(folder / "venv")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        tree = folder / "tree"
        shutil.copytree(source, tree)
        if way == "sdist":
            python("-c", "from setuptools import build_meta; build_meta.build_sdist('.')", cwd=tree)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # with ninja
        if WAYS[way]:
            python(*PIP, *WAYS[way], cwd=tree, executable=executable, PATH=path, CUDA_HOME=str(elsewhere))
        in_tree = way.startswith(("editable", "uninstalled"))
        kernels = tree / "kernels" if in_tree else site / "fastbert/kernels"
        return Install(executable, tree if way == "uninstalled" else elsewhere, kernels)

    return make


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    """A folder with the index's `kernels` in a folder of that name, and Triton in another."""
    with tempfile.TemporaryDirectory() as folder:  # a gigabyte, which pytest's own would keep
        for name in ("kernels", "triton"):
            constraints = str(ROOT / "requirements/constraints.txt")
            python(*PIP, "install", "--no-deps", "-c", constraints, "--target", f"{folder}/{name}", name, cwd=ROOT)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "beside", [[], ["kernels"], ["triton"], ["kernels", "triton"]], ids=lambda b: "+".join(b) or "alone"
)
@pytest.mark.parametrize("way", WAYS)
def test_a_program(way: str, beside: list[str], install: Callable[[str], Install], packages: Path) -> None:
    installed, uninstalled = install(way), way == "uninstalled"
    path = os.pathsep.join(str(packages / name) for name in beside)
    hidden = [] if "triton" in beside else ["triton"]  # which torch for CUDA brings
    found = loads(python("-c", USE, *hidden, cwd=installed.cwd, executable=installed.python, PYTHONPATH=path))

    def place(name: str, otherwise: str) -> str:
        return str(packages / name / name / "__init__.py") if name in beside else otherwise

    assert Path(found.pop("fastbert.kernels")).resolve() == installed.kernels / "probe.py"
    assert not found.pop("kernels, as transformers sees it") or "kernels" in beside  # it wants certain versions of it
    assert found == {
        "kernels": place("kernels", "a folder" if uninstalled else "nowhere"),  # ours is no package: theirs goes before
        "triton": place("triton", "nowhere"),
        "native": NOT_BUILT if uninstalled else "",
        "cuda": NOT_BUILT if uninstalled else "nvcc was not found when fastbert was built",
        "parity": True,
        "forwards": {"": 1, "attentions were asked for": 1},
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["editable, lenient", "editable, strict"])
def test_editable_without_a_compiler(way: str, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "tree")
    executable, _ = make_venv(tmp_path / "venv")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    python(*PIP, *WAYS[way], cwd=tmp_path / "tree", executable=executable, PATH=str(nothing), CUDA_HOME=str(nothing))
    assert python("-c", TELL, cwd=nothing, executable=executable).startswith("False False no C++ compiler")


def test_kernels_in_a_checkout_that_is_not_installed(source: Path) -> None:
    assert python("-c", KERNEL, cwd=source) == f"{source}/kernels/probe.py False"
