"""Which kernels are proven on which card: the records in proven.json, each of certain sources.

`python -m benchmarks.proven RECORD` writes them, from what `python -m benchmarks.gpu_record` measured.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TypedDict

PACKAGE = Path(__file__).resolve().parent
RECORDS = PACKAGE / "proven.json"
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
    """All records of the package; none if the file is missing or damaged."""
    try:
        found: list[Record] = json.loads(RECORDS.read_text(encoding="utf-8"))["proven"]
        return tuple(found)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def record_of(kernel: str, backend: str, dtype: str, card: str) -> Record | None:
    """The record that vouches for a kernel as it is now."""
    for record in records():
        about = record["kernel"], record["backend"], record["card"]
        if about == (kernel, backend, card) and dtype in record["dtypes"] and not is_stale(record):
            return record
    return None


def is_stale(record: Record) -> bool:
    """Whether the kernel's sources have changed since; where they are not installed with it, they cannot have."""
    return digest(record["kernel"], record["backend"]) not in ("", record["sources"])


def sources(kernel: str, backend: str) -> list[Path]:
    """The files that a kernel is made of; none where only the built library is installed.

    A backward stands in the files of its op. What the files of the native library share counts for every kernel.
    """
    name = kernel.removesuffix("_backward")
    if backend == "triton":
        inside = PACKAGE / "kernels"
        return sorted((inside if inside.is_dir() else PACKAGE.parent / "kernels").glob(f"{name}.py"))
    csrc = PACKAGE.parent / "csrc"
    if not (csrc / "ops.cpp").is_file():
        return []
    own = csrc / backend
    return sorted({*csrc.glob("*.*"), *own.glob("*.h"), *own.glob("*.cuh"), *own.glob(f"{name}.*")})


@functools.cache
def digest(kernel: str, backend: str) -> str:
    """A digest of a kernel's sources; empty: they are not here."""
    files = sources(kernel, backend)
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest() if files else ""
