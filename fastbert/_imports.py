"""Acts when a module of transformers is imported, so that `import fastbert` need not import it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger("fastbert")


def register_quantizer() -> None:
    """Teaches `from_pretrained` to load what `fastbert.quantize` made, once transformers' quantizers are imported."""
    after_import("transformers.quantizers.auto", _import_quantizer)


def _import_quantizer() -> None:
    try:
        importlib.import_module("fastbert.models.quantizer")
    except Exception as error:  # whatever a changed interface raises, transformers must go on
        logger.warning(f"models that fastbert.quantize made cannot be loaded: {type(error).__name__}: {error}")


def after_import(name: str, act: Callable[[], object]) -> None:
    """Calls `act` once the module `name` has been executed: now if it has, else at its import."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and lets its loader call `act` after it."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; None of every other module."""
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.act()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
