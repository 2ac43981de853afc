"""Backend "triton": the kernels of `kernels/`, each imported at its first use."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from fastbert.ops.packed import PackedWeight
from fastbert.ops.registry import Backend

PACKAGE = f"{__name__.split('.')[0]}.kernels"


@functools.cache
def absent() -> str:
    """Why Triton cannot be imported, in words; "": it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken install raises anything
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "Triton is not installed (pip install triton)" if is_missing else f"Triton cannot be imported: {error}"
    return ""


@functools.cache
def kernel(name: str) -> ModuleType:
    """The module of an op's kernels."""
    return importlib.import_module(f"{PACKAGE}.{name.removesuffix('_backward')}")


def plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with weights that were packed for a CPU's products unpacked again."""
    return tuple(a.to_dense() if isinstance(a, PackedWeight) else a for a in args)


def triton_backend(name: str) -> Backend:
    """The backend "triton" of an op; on a CPU it runs only where it is asked for, in Triton's interpreter."""

    def refuse(*args: Any) -> list[str]:
        if args[0].device.type not in ("cuda", "cpu"):
            return [f"it runs on cuda, not on {args[0].device.type}"]
        if reason := absent():
            return [reason]
        return getattr(kernel(name), f"{name}_reasons")(*plain(args))  # type: ignore[no-any-return]

    def run(*args: Any) -> Any:
        device, args = args[0].device, plain(args)
        launch = getattr(kernel(name), name)
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):  # Triton launches on the current one
            return launch(*args)

    return Backend("triton", run, refuse, devices=("cuda",), on_request=("cpu",))
