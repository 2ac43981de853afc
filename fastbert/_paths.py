"""Makes the folder `kernels/` of a checkout importable as `fastbert.kernels`."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path


def register_kernels() -> None:
    """Registers `fastbert.kernels` as a namespace package over ../kernels; call it while `fastbert` is imported.

    In a wheel the folder is `fastbert/kernels` and nothing is done. Nothing is done either when the folder beside the
    package is another project's: ours has no `__init__.py`, the index's `kernels` has one.
    """
    package = Path(__file__).parent
    folder = package.parent / "kernels"
    if (package / "kernels").is_dir() or not folder.is_dir() or (folder / "__init__.py").exists():
        return
    name = f"{__package__}.kernels"
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = module_from_spec(spec)
    vars(sys.modules[__package__])["kernels"] = sys.modules[name]
