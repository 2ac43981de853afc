"""HuggingFace's own model: as it is, and under torch.compile with frozen weights, PyTorch's best on a CPU.

Both run sdpa attention. Freezing packs the weights for oneDNN.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.rival import Bind
from fastbert.bench_model import forward
from fastbert.dtypes import DTYPES

DTYPES_OF = ("fp32", "bf16")
COMPILE: dict[str, Any] = {"dynamic": True, "options": {"freezing": True}}
TRACE: dict[str, Any] = {"dynamic": True, "backend": "eager"}  # of a dry run: traced, not compiled


def available() -> str:
    return ""


def compiler() -> str:
    """ "", or why torch.compile cannot run here."""
    return "" if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler: install g++"


def make(model: Any, dtype: str, folder: Path, compiled: dict[str, Any] | None = None) -> Bind:
    """compiled: torch.compile's options; None: the model as it is."""
    own = copy.deepcopy(model).to(DTYPES[dtype])
    if compiled is not None:
        torch._dynamo.config.recompile_limit = 64  # behind it a model would run as it is, without a word
        own = torch.compile(own, **compiled)
    return lambda batch: lambda: forward(own, batch)
