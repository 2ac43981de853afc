"""The native library and the emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of the repository gets a library that is compiled with both; there pytest runs every test of the library's ops in
a process into which the sanitizers' runtime is preloaded. Errors planted in such copies must be found.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests import emulated
from tests.build.conftest import ROOT

pytestmark = pytest.mark.slow

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
SHARED = "-fsanitize-sections=emulated_shared"  # watches the emulator's __shared__ arrays too
NATIVE, EMULATED = "tests/build/test_*_native.py", "tests/build/test_unpad_emulated.py"
# by tests/ops, beside those with a file in NATIVE
ON_CPU = (
    "add_layer_norm", "attention", "embed_layer_norm", "encoder_forward", "feed_forward", "linear", "linear_gelu",
    "quantized_linear",
)  # fmt: skip
ON_GPU = (
    "add_layer_norm", "attention", "bias_gelu", "dropout_bits", "embed_layer_norm", "feed_forward", "pad", "unpad",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(compiler: str) -> dict[str, str]:
    """The variables under which a Python process runs code that was compiled with the sanitizers."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):  # the last, or exceptions are not seen by the first
        ask = [compiler, f"-print-file-name={name}"]
        runtimes.append(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    missing = [name for name in runtimes if not Path(name).is_absolute()]  # g++ names what it does not find as it was
    if missing:
        pytest.skip(f"{compiler} comes without {', '.join(missing)}")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    return kept | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks; a refused allocation has words
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CXXFLAGS": f"{FLAGS} {SHARED}",  # for the emulator
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A copy of the repository without a library."""
    ignored = shutil.ignore_patterns("__pycache__", "_native.*")
    for folder in ("benchmarks", "fastbert", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


def build(tree: Path, setup_py: ModuleType, compiler: str) -> None:
    """Compiles the tree's library with the sanitizers, from the sources and with the flags of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup_py, "CSRC", tree / "csrc")
        patch.setattr(setup_py, "CXX_FLAGS", f"{setup_py.CXX_FLAGS} {FLAGS}")
        torch = setup_py.find_torch()
        assert setup_py.compile_library(tree / "fastbert/_native.so", tree / "build", torch, compiler, None) == ""
    (tree / "fastbert/_native.json").write_text(json.dumps({"library": "", "cuda": "not compiled with sanitizers"}))


def run_tests(tree: Path, environment: dict[str, str], *tests: str, chosen: str = "not planted") -> tuple[bool, str]:
    """Whether pytest ran these tests without a failure, and all that was written."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", chosen, "-m", "not slow"]
    run = subprocess.run(
        [*command, *tests], cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return run.returncode == 0, run.stdout


@pytest.mark.parametrize("kind", [NATIVE, EMULATED], ids=["native", "emulated"])
def test_no_error_is_found(
    kind: str, tree: Path, setup_py: ModuleType, compiler: str, environment: dict[str, str]
) -> None:
    build(tree, setup_py, compiler)
    files = sorted(str(path.relative_to(tree)) for path in tree.glob(kind))
    assert files
    passed, said = run_tests(tree, environment, *files)
    assert passed, said
    assert "skipped" not in said and re.search(r"\b\d\d+ passed", said), said


def test_no_error_is_found_in_the_cuda_kernels(tree: Path, environment: dict[str, str]) -> None:
    """By what tests/ops asks of them, emulated."""
    files = [f"tests/ops/test_{op}.py" for op in ON_GPU]
    passed, said = run_tests(tree, environment, *files, chosen="cuda and not opcheck")
    assert passed, said
    assert re.search(r"\b\d{3,} passed", said), said


@pytest.fixture
def plainly_emulated(environment: dict[str, str]) -> dict[str, str]:
    """The variables with CUDA's kernels as they are built without sanitizers, for tests of others in tests/ops."""
    return environment | {"FASTBERT_EMULATED": str(emulated.built())}


def test_no_error_is_found_in_the_vector_code(
    tree: Path, setup_py: ModuleType, compiler: str, plainly_emulated: dict[str, str]
) -> None:
    """By every instruction set, and by what tests/ops asks of every backend."""
    build(tree, setup_py, compiler)
    files = [f"tests/ops/test_{name}.py" for name in ("isas", "attention_cpu", "products_cpu", *ON_CPU)]
    passed, said = run_tests(tree, plainly_emulated, *files, chosen="isas or products or (cpu and not opcheck)")
    assert passed, said
    assert re.search(r"\b\d{3,} passed", said), said


def test_every_op_of_the_library_has_tests_here() -> None:
    ops = {"linear_gelu", "quantized_linear"}  # which are packed_linear
    for name in ("ops_cpu", "ops_encoder"):
        source = (ROOT / f"csrc/{name}.cpp").read_text()
        on_cpu = source.partition("STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CPU, m)")[2].partition("}")[0]
        found = re.findall(r'm\.impl\("(\w+)"', on_cpu)
        ops |= {op.removeprefix("packed_").removesuffix("_backward") for op in found}
    assert ops > set(ON_CPU)
    for op in ops - set(ON_CPU):
        assert (ROOT / f"tests/build/test_{op}_native.py").is_file(), op
    files = {path.stem.removesuffix("_backward") for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert files <= set(ON_GPU)


NATIVE_TESTS, EMULATED_TESTS = "tests/build/test_unpad_native.py", "tests/build/test_unpad_emulated.py"
ALL_REAL = f"{NATIVE_TESTS}::test_cases[cpu-all real]"
EMULATED_ALL_REAL = f"{EMULATED_TESTS}::test_cases[all real-first warp first]"
CPU, OPS, TENSORS, CUDA = "csrc/cpu/unpad.cpp", "csrc/ops_cpu.cpp", "csrc/tensors.h", "csrc/cuda/unpad.cu"
PLANTED = {  # file, what is right, what is wrong, the test that comes by it, what the sanitizer calls it
    "one element read beyond the heap": (
        CPU, "column < columns; ++column) length", "column <= columns; ++column) length",
        ALL_REAL, "heap-buffer-overflow",
    ),
    "one element written beyond the heap": (
        OPS, "cu_seqlens[row + 1] = static_cast", "cu_seqlens[row + 2] = static_cast",
        ALL_REAL, "heap-buffer-overflow",
    ),
    "memory used after it was freed": (
        OPS, "indices_tensor.data_ptr());\n  torch::stable::parallel_for",
        "empty_indices(mask_tensor, total).data_ptr());\n  torch::stable::parallel_for",
        ALL_REAL, "heap-use-after-free",
    ),
    "signed overflow": (
        CPU, "int32_t length = 0;", "int32_t length = 2147483647;", ALL_REAL, "signed integer overflow",
    ),
    "signed overflow of the number of rows": (
        TENSORS, 'check(tensor.size(0) <= kMaxInt32, "unpad: mask has more than 2147483647 rows");', "",
        f"{NATIVE_TESTS}::test_refuses_strange_masks_in_words[as many rows as there are]", "signed integer overflow",
    ),
    "a stride that leads nowhere": (
        TENSORS, "if (mask.columns > 1) mask.column_stride =", "mask.column_stride =",
        f"{NATIVE_TESTS}::test_takes_odd_masks[one element, any stride]", "signed integer overflow",
    ),
    "a load that must be aligned": (
        CPU, "std::memcpy(&word, element, sizeof(Word));", "word = *reinterpret_cast<const Word*>(element);",
        f"{NATIVE_TESTS}::test_takes_odd_masks[not aligned]", "misaligned address",
    ),
    "one element read beyond the heap, on a GPU": (
        CUDA, "column < columns && ", "column <= columns && ", EMULATED_ALL_REAL, "heap-buffer-overflow",
    ),
    "an index beyond shared memory": (
        CUDA, "warp_sums[kScanWarps];", "warp_sums[kScanWarps - 1];", EMULATED_ALL_REAL, "out of bounds",
    ),
    "one element written beyond shared memory": (  # by a pointer that the compiler cannot follow
        CUDA, "warp_sums[warp] = inclusive;", "{ int64_t* volatile sums = warp_sums; sums[warp + 1] = inclusive; }",
        EMULATED_ALL_REAL, "global-buffer-overflow",
    ),
    "signed overflow on a GPU": (
        CUDA, "int32_t length = 0;", "int32_t length = 2147483647;", EMULATED_ALL_REAL, "signed integer overflow",
    ),
}  # fmt: skip
WIDTHS = "tests/ops/test_isas.py::test_widths_around_those_of_vectors"
IN_VECTOR_CODE = {
    "an element read behind the last": (
        "csrc/cpu/vectors.h", "std::memcpy(&found, from, part.count * sizeof(T));",
        "std::memcpy(&found, from, (part.count + 1) * sizeof(T));", f"{WIDTHS}[baseline-torch.bfloat16-3]",
    ),
    "an element written behind the last": (
        "csrc/cpu/vectors.h", "std::memcpy(to, &x, part.count * sizeof(T));",
        "std::memcpy(to, &x, (part.count + 1) * sizeof(T));", f"{WIDTHS}[baseline-torch.bfloat16-3]",
    ),
    "a task's memory as short as a row": (
        "csrc/rows.h", "kRowPadding = 64", "kRowPadding = 0", f"{WIDTHS}[baseline-torch.bfloat16-3]",
    ),
    "a product's memory as small as one tile's": (
        "csrc/linear.h", "(tile > kBlockBytes ? tile : kBlockBytes)", "tile",
        "tests/ops/test_products_cpu.py::test_shapes_around_tiles_and_panels[baseline-torch.float32-(225, 100, 300)]",
    ),
    "a vector of a panel read behind the weight": (
        "csrc/cpu/linear.cpp", "b += kPanel) {", "b += kPanel + 1) {",
        "tests/ops/test_products_cpu.py::test_shapes_around_tiles_and_panels[baseline-torch.float32-(14, 64, 128)]",
    ),
}  # fmt: skip
IN_CUDA = {
    "a column read behind the last row": (
        "i < left ? to_float(from[i])",
        "i < left ? to_float(from[i]) : left > 0 ? 0 * to_float(from[i])",
    ),
    "a column written behind the last row": ("if (i < left) to[i]", "if (i <= left) to[i]"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(
    error: str, tree: Path, setup_py: ModuleType, compiler: str, environment: dict[str, str]
) -> None:
    file, right, wrong, test, words = PLANTED[error]
    source = (tree / file).read_text()
    assert source.count(right) == 1
    (tree / file).write_text(source.replace(right, wrong))
    build(tree, setup_py, compiler)
    passed, said = run_tests(tree, environment, test)
    assert not passed and words in said, said


@pytest.mark.parametrize("error", IN_CUDA)
def test_planted_errors_in_the_cuda_kernels_are_found(error: str, tree: Path, environment: dict[str, str]) -> None:
    right, wrong = IN_CUDA[error]
    source = (tree / "csrc/cuda/rows.cuh").read_text()
    assert source.count(right) == 1
    (tree / "csrc/cuda/rows.cuh").write_text(source.replace(right, wrong))
    test = "tests/ops/test_add_layer_norm.py::test_parity[add_layer_norm-odd-float32-cuda]"
    passed, said = run_tests(tree, environment, test)
    assert not passed and "heap-buffer-overflow" in said, said


@pytest.mark.parametrize("error", IN_VECTOR_CODE)
def test_planted_errors_in_the_vector_code_are_found(
    error: str, tree: Path, setup_py: ModuleType, compiler: str, plainly_emulated: dict[str, str]
) -> None:
    file, right, wrong, test = IN_VECTOR_CODE[error]
    source = (tree / file).read_text()
    assert source.count(right) == 1
    (tree / file).write_text(source.replace(right, wrong))
    build(tree, setup_py, compiler)
    passed, said = run_tests(tree, plainly_emulated, test)
    assert not passed and "heap-buffer-overflow" in said, said
