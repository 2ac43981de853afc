"""What the built library asks of the machine that loads it, and what fastbert.native says where there is none."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest
import torch

from fastbert import native, ops

# torch's stable C interface, the C and C++ runtimes; nothing of c10::, at:: or torch::, which change between versions
STABLE = re.compile(r"(aoti_torch_|torch_)\w+$|_ZNK?St\w+$|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")


def undefined_symbols(library: Path) -> list[tuple[str, str]]:
    """(kind, name): kind U is needed, w is used where it is there."""
    nm = which("nm") or pytest.skip("no nm on this machine")
    lines = subprocess.run([nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return [(line.split()[-2], line.split()[-1]) for line in lines.stdout.splitlines()]


@pytest.fixture
def built() -> None:
    if not native.LIBRARY.exists():
        pytest.skip(native.load().reason)


@pytest.mark.usefixtures("built")
def test_what_was_built_loads() -> None:
    assert native.load().available, native.load().reason


@pytest.mark.usefixtures("built")
def test_needs_only_stable_symbols() -> None:
    symbols = undefined_symbols(native.LIBRARY)
    needed = [name for kind, name in symbols if kind == "U"]
    assert "torch_library_impl" in needed
    assert [name for name in needed if not STABLE.match(name)] == []
    if native.load().has_cuda:  # else torch without CUDA could not load it
        assert ("w", "aoti_torch_get_current_cuda_stream") in symbols


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which fastbert.native looks for its library, for one test."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def test_not_installed(folder: Path) -> None:
    assert not native.load().available and not native.load().has_cuda
    assert native.refuse("cpu") == native.refuse("cuda") == [native.load().reason]
    assert "was not built" in native.load().reason
    with pytest.raises(RuntimeError, match="unpad: the native library was not built"):
        native.unpad(torch.ones(2, 2))


def test_the_reason_of_the_build_is_told(folder: Path) -> None:
    (folder / "_native.json").write_text(json.dumps({"library": "no compiler", "cuda": "no compiler"}))
    assert native.refuse("cpu") == ["no compiler"]


def test_a_library_that_does_not_load(folder: Path) -> None:
    (folder / "_native.json").write_text(json.dumps({"library": "", "cuda": ""}))
    (folder / "_native.so").write_bytes(b"not a library")
    assert len(native.refuse("cpu")) == 1
    assert native.refuse("cpu")[0].startswith("the native library does not load: ")


def test_no_cuda_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Native("", "nvcc was not found"))
    assert native.refuse("cpu") == []
    assert native.refuse("cuda") == ["the native library has no CUDA kernels: nvcc was not found"]
    assert native.refuse("mps") == ["the native library has no kernels for mps"]


def test_cuda_kernels_run_on_a_cpu_where_they_are_emulated_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one, backend = torch.ones(2, 8), torch.ones(8), ops.add_layer_norm.backends["cuda"]
    monkeypatch.setattr(native, "_emulated", "")
    assert backend.reasons(x, None, x, one, one, 1e-12) == ["it runs on cuda, not on cpu"]
    with ops.use_backend("cuda"), pytest.raises(ops.BackendRefused, match="it runs on cuda, not on cpu"):
        ops.add_layer_norm(x, None, x, one, one, 1e-12)
    monkeypatch.setattr(native, "_emulated", "some")
    assert backend.reasons(x, None, x, one, one, 1e-12) == []
    assert backend not in ops.add_layer_norm.order("cpu")
    wide = torch.ones(2, 4104, dtype=torch.float64)
    gain = torch.ones(4104)
    assert backend.reasons(wide, None, wide, gain, gain, 1e-12) == [
        "hidden size 4104 is over 4096",
        "x is torch.float64: it takes float32, float16 and bfloat16",
        "residual is torch.float64: it takes float32, float16 and bfloat16",
        "gamma is torch.float32 and residual torch.float64",
        "beta is torch.float32 and residual torch.float64",
    ]


def test_a_card_or_driver_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Native("", ""))
    monkeypatch.setattr(native, "_cuda_problem", lambda: "no kernel image")
    assert native.refuse("cuda") == ["the native library's CUDA kernels do not run here: no kernel image"]
