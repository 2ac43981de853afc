"""What every engine has in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.workloads import Batch

INSTALL = "pip install 'fastbert-kernels[peers]'"
Run = Callable[[], Tensor]  # the last hidden state [B, S, H]; pad rows may hold anything
Bind = Callable[[Batch], Run]  # a batch in the engine's own form of input, which is made once and not timed
Make = Callable[[Any, str, Path], Bind]


@dataclass(frozen=True)
class Rival:
    """An engine.

    Args:
        dtypes: the precisions it is asked for; what it does not have on this machine it refuses when it is made.
        available: "", or in words why it cannot run here and what to install.
        make: (HuggingFace's model in fp32, which is not changed; dtype; a folder for what it converts, the same for
            every dtype and run) → how it takes a batch.
    """

    name: str
    dtypes: tuple[str, ...]
    available: Callable[[], str]
    make: Make


def missing(modules: Sequence[str]) -> str:
    """ "", or which modules are not installed and how to install them."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; {INSTALL}" if absent else ""
