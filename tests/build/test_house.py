"""The rules of the house that a machine can see: the direction of imports, the place of private names."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A module may import from its own level and from higher numbers only.
LEVELS = [
    ["fastbert.cli", "fastbert.__main__"],
    ["fastbert.report", "fastbert.doctor"],
    ["fastbert.bench_model", "fastbert.bench", "fastbert.parity_models", "fastbert.pytest_plugin"],
    ["fastbert.limits", "fastbert.workloads", "fastbert.checkpoint", "fastbert.provenance"],
    ["fastbert.models"],
    ["fastbert.layers", "fastbert.hf"],
    ["fastbert.ops.samples", "fastbert.ops.batch_invariant"],
    ["fastbert.ops.packing"],
    ["fastbert.ops.declare"],
    [
        "fastbert.ops.builtins",
        "fastbert.ops.cpu",
        "fastbert.ops.cuda",
        "fastbert.ops.kernels",
        "fastbert.ops.registry",
        "fastbert.ops.self_check",
        "fastbert.ops.sample_calls",
    ],
    ["fastbert.devices"],
    ["fastbert.ops.reference", "fastbert.native"],
    [
        "fastbert.ops.dropout",
        "fastbert.ops.encoder",
        "fastbert.ops.packed",
        "fastbert.torch_private",
        "fastbert.dtypes",
        "fastbert.once",
        "fastbert.parity",
        "fastbert.proven",
        "fastbert.pooling",
        "fastbert._paths",
        "fastbert._imports",
    ],
]
SOURCES = sorted(path for path in (ROOT / "fastbert").rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(name):
    found = [i for i, names in enumerate(LEVELS) for n in names if name == n or name.startswith(n + ".")]
    return found[0] if found else None


def imports(path):
    """The modules that a file imports, function bodies included: "a.b" of `import a.b` and of `from a import b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"{'.' * node.level}{node.module or ''}"
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    name = module_name(path)
    if name in ("fastbert", "fastbert.ops", "fastbert.models"):  # the public names of a package
        return
    own = level(name)
    assert own is not None, f"{name} has no level: add it to LEVELS"
    for imported in imports(path):
        other = level(imported)
        assert other is None or other >= own, f"{name} imports {imported}"
        assert not imported.startswith(("tests", "benchmarks")), f"{name} imports {imported}"


PRIVATE = re.compile(
    r"\b(torch|transformers|F|nn|model|module|tensor|config)(\.\w+)*\._(?!_)\w+"
    r"|\._version\b|_hf_hook|_create_attention_masks|_attn_implementation|_active_collector|_CAN_RECORD"
)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_private_names_of_torch_and_transformers_stand_in_one_file_each(path):
    if path.name in ("torch_private.py", "hf.py"):
        return
    source = path.read_text()
    docstrings = [node.value.value for node in ast.walk(ast.parse(source)) if is_text(node)]
    for text in docstrings:
        source = source.replace(text, "")
    found = {match.group() for match in PRIVATE.finditer(source)} - {"model._fastbert", "self._fastbert"}
    assert found == set(), found


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_cuda_files_are_free_of_torch():
    files = sorted((ROOT / "csrc").rglob("*.*"))
    assert any(path.suffix == ".cu" for path in files)
    for path in files:
        if not path.name.startswith("ops_") and path.name not in ("tasks.h", "tensors.h"):
            assert "torch/" not in path.read_text() and "at::" not in path.read_text(), path


def test_kernels_are_no_package_and_import_torch_and_triton_alone():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").glob("*.py"):
        for imported in imports(path):
            top = imported.split(".")[0]  # "" of a sibling
            assert top in ("torch", "triton", "") or top in sys.stdlib_module_names, f"{path.name} imports {imported}"


def test_one_op_has_one_name_in_every_room():
    from fastbert import ops
    from fastbert.ops import builtins, reference

    for op in ops.ALL:
        assert hasattr(reference, op.name) and hasattr(builtins, op.name)
        forward = op.name.removesuffix("_backward")  # a backward is tested in the file of its op
        assert (ROOT / "tests" / "ops" / f"test_{forward}.py").is_file(), op.name
