import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import emulated

ROOT = Path(__file__).parents[2]
PIP = ["-m", "pip", "--disable-pip-version-check", "-q"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]
KERNEL = "import sys, fastbert.kernels.probe as p; print(p.PLACE, 'kernels' in sys.modules)"
TELL = "from fastbert.native import load; n = load(); print(n.available, n.has_cuda, n.reason or n.cuda_reason)"


def python(*arguments: str, cwd: Path, executable: str = sys.executable, **variables: str) -> str:
    """What a Python in `cwd` prints, without the variables that choose toolchains and packages, with `variables`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CXX", "PYTHONPATH")}
    environment |= {"HF_HUB_OFFLINE": "1"} | variables
    run = subprocess.run([executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="session")
def setup_py() -> ModuleType:
    return emulated.setup_py()


@pytest.fixture(scope="session")
def compiler(setup_py: ModuleType) -> str:
    return setup_py.find_compiler() or pytest.skip("no C++ compiler on this machine")


@pytest.fixture(scope="session")
def nvcc(setup_py: ModuleType) -> str:
    return setup_py.find_nvcc() or pytest.skip("no nvcc on this machine")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, with one kernel in it and nothing built. Builds leave files behind: copy it."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("fastbert", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "_native.*"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    (source / "kernels/probe.py").write_text("PLACE = __file__\n")
    return source
