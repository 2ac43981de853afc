"""HuggingFace's common model tests, imported from the sdist of transformers that the Makefile unpacks into .cache/."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import transformers

FOLDER = Path(__file__).parents[2] / ".cache" / "transformers-tests"
PACKAGE = "transformers_tests"  # the sdist calls it `tests`, as this repository calls its own
# Of tests/ the sdist holds test_*.py alone. The mixins that test_modeling_common imports from elsewhere are empty here.
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def missing() -> str:
    """Why the tests cannot run here; empty: they can."""
    folder = FOLDER / f"transformers-{transformers.__version__}"
    if (folder / "tests" / "test_modeling_common.py").is_file():
        return ""
    found = ", ".join(path.name for path in FOLDER.glob("transformers-*")) or "nothing"
    wanted = f"the tests of transformers {transformers.__version__} are not in {FOLDER.name}"
    return f"{wanted} ({found} is); `make test` fetches those of the version in constraints.txt"


def package(name: str, *folders: Path) -> None:
    module = types.ModuleType(name)
    module.__path__ = [str(folder) for folder in folders]
    sys.modules[name] = module


def load(name: str) -> Any:
    """A module of the tests/ folder of transformers, e.g. "test_modeling_common"."""
    if PACKAGE not in sys.modules:
        package(PACKAGE, FOLDER / f"transformers-{transformers.__version__}" / "tests")
        for path, mixin in ABSENT.items():
            package(f"{PACKAGE}.{path.split('.')[0]}")
            module = sys.modules[f"{PACKAGE}.{path}"] = types.ModuleType(f"{PACKAGE}.{path}")
            setattr(module, mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.{name}")
