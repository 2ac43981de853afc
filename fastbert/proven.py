"""Which kernels are proven on which card: the records in proven.json, each of certain sources.

`python -m benchmarks.proven RECORD` writes them, from what `python -m benchmarks.gpu_record` measured. setup.py runs
this file by itself, where neither torch nor fastbert can be imported: it needs the standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

PACKAGE = Path(__file__).resolve().parent
RECORDS = PACKAGE / "proven.json"
# Kernels of the native library that are made of others' files; on CUDA with products of torch's library around them.
MADE_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {"linear_gelu": ("bias_gelu",), "feed_forward": ("bias_gelu",)},
    "cpu": {
        "linear_gelu": ("linear",),
        "feed_forward": ("linear",),
        "quantized_linear": ("linear",),
        "encoder_forward": ("linear", "attention", "add_layer_norm"),
    },
}
OWN = frozenset({"cpu", "cuda", "triton"})  # the backends whose kernels are ours, not PyTorch's


class Record(TypedDict):
    """Parity of one kernel on one card.

    kernel, backend: e.g. "unpad", "cuda". dtypes: of its main input, e.g. "bfloat16". card: `devices.card`.
    sources: `digest`. commit, date: of the measurement; measured: where its rows stand.
    """

    kernel: str
    backend: str
    card: str
    dtypes: list[str]
    sources: str
    commit: str
    date: str
    measured: str


@functools.cache
def records() -> tuple[Record, ...]:
    """All records of the package; none if the file is missing or damaged, and none that is not whole."""
    try:
        return tuple(record for record in json.loads(RECORDS.read_text(encoding="utf-8"))["proven"] if is_whole(record))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def is_whole(record: Any) -> bool:
    """Whether this is a record: it has every field, each of its type."""
    if not isinstance(record, dict) or not isinstance(record.get("dtypes"), list):
        return False
    texts = [*record["dtypes"], *(record.get(name) for name in Record.__annotations__ if name != "dtypes")]
    return all(isinstance(text, str) for text in texts)


def record_of(kernel: str, backend: str, dtype: str, card: str) -> Record | None:
    """The record that vouches for a kernel as it is now."""
    for record in records():
        about = record["kernel"], record["backend"], record["card"]
        if about == (kernel, backend, card) and dtype in record["dtypes"] and not is_stale(record):
            return record
    return None


def is_stale(record: Record) -> bool:
    """Whether the kernel that would run is made of other sources, or nobody knows of which."""
    sources = running(record["kernel"], record["backend"])
    return not sources or sources != record["sources"]


def running(kernel: str, backend: str) -> str:
    """The digest of the sources of the kernel that would run; empty: unknown.

    A kernel of the native library is what was compiled, whatever stands in csrc/ now.
    """
    if backend == "triton":
        return digest(kernel, backend)
    return built_sources().get(built_name(kernel, backend), "")


@functools.cache
def built_sources() -> Mapping[str, str]:
    """What setup.py wrote of the native library: `built_name` → the digest of what it compiled."""
    try:
        found = json.loads((PACKAGE / "_native.json").read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, KeyError, TypeError):  # not built, damaged, or built before it was written
        return {}
    return found if isinstance(found, dict) else {}


def built_name(kernel: str, backend: str) -> str:
    """How setup.py names a kernel of the native library in _native.json: "unpad cpu"."""
    return f"{kernel.removesuffix('_backward')} {backend}"


def sources(kernel: str, backend: str) -> list[Path]:
    """The files that a kernel is made of; none where only the built library is installed.

    A backward stands in the files of its op. A kernel of Triton is made of the files beside it that it imports, too;
    what the files of the native library share counts for every kernel.
    """
    name = kernel.removesuffix("_backward")
    if backend == "triton":
        inside = PACKAGE / "kernels"
        return with_imports((inside if inside.is_dir() else PACKAGE.parent / "kernels") / f"{name}.py")
    csrc = PACKAGE.parent / "csrc"
    if not (csrc / "ops_cpu.cpp").is_file():
        return []
    own = csrc / backend
    made = MADE_OF[backend].get(name, (name,))
    mine = [path for one in made for path in (*own.glob(f"{one}.*"), *own.glob(f"{one}_backward.*"))]
    return sorted({*csrc.glob("*.*"), *own.glob("*.h"), *own.glob("*.cuh"), *mine})


def with_imports(path: Path) -> list[Path]:
    """A Python file and those beside it that it imports, they too with theirs; none if there is no such file."""
    found, waiting = set[Path](), [path]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.add(path)
            siblings = re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
            waiting += [path.with_name(f"{name}.py") for name in siblings]
    return sorted(found)


@functools.cache
def digest(kernel: str, backend: str) -> str:
    """A digest of a kernel's sources; empty: they are not here."""
    files = sources(kernel, backend)
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest() if files else ""
