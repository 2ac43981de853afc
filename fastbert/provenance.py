"""What a figure was measured on: machine, versions, commit, load. Plain dicts, ready for JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastbert

PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers", "safetensors")
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve")


def provenance(more: Sequence[str] = ()) -> dict[str, Any]:
    """Machine, versions, git commit, date (UTC) and load average of this moment.

    more: further packages whose versions count.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(more),
        "git": git(),
        "load_average": load_average(),
    }


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, torch's threads and its vector instructions, CUDA devices."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "cuda": [cuda_device(i) for i in range(torch.cuda.device_count())],
    }


def cuda_device(index: int) -> dict[str, Any]:
    """Name, compute capability, multiprocessors and memory (bytes) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Python and the packages a figure depends on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastbert": fastbert.__version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["CUDA of torch"] = torch.version.cuda
    return found


def git() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it, when the package stands in a git checkout; else None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]  # status may write the index
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def load_average() -> list[float] | None:
    """Load over 1, 5 and 15 minutes; None where the system has none."""
    try:
        return [round(x, 2) for x in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
