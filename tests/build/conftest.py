import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def setup_py() -> ModuleType:
    """setup.py as a module: its functions, without running setup()."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiler(setup_py: ModuleType) -> str:
    return setup_py.find_compiler() or pytest.skip("no C++ compiler on this machine")


@pytest.fixture(scope="session")
def nvcc(setup_py: ModuleType) -> str:
    return setup_py.find_nvcc() or pytest.skip("no nvcc on this machine")
