"""What this machine can run, and in words why not more. Every part is guarded: the doctor itself never fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from fastbert.checkpoint import MissingModel, demo_folder
from fastbert.provenance import provenance


def examine() -> dict[str, Any]:
    """Versions, machine, native library, Triton, private names and every op's backends, ready for JSON."""
    return {
        "format": 1,
        "provenance": provenance(),
        "native": _guarded(native_library),
        "triton": _guarded(triton),
        "demo": _guarded(demo),
        "private names of torch": _guarded(torch_names),
        "private names of transformers": _guarded(transformers_names),
        "ops": _guarded(op_backends),
    }


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def native_library() -> dict[str, list[str]]:
    """Device type → why the native library has no kernels for it; empty: it has."""
    from fastbert import native

    return {device: native.refuse(device) for device in ("cpu", "cuda")}


def triton() -> dict[str, Any]:
    """Triton's version, and why its kernels cannot run here (None: they can)."""
    if importlib.util.find_spec("triton") is None:
        return {"version": None, "reason": "triton is not installed"}
    import triton as module

    reason = None if torch.cuda.is_available() else "Triton's kernels need a CUDA device, and torch sees none"
    return {"version": getattr(module, "__version__", "unknown"), "reason": reason}


def demo() -> dict[str, Any]:
    """Where the demo checkpoint is, or how to get it."""
    try:
        return {"folder": str(demo_folder()), "reason": None}
    except MissingModel as missing:
        return {"folder": None, "reason": str(missing)}


def torch_names() -> dict[str, str | None]:
    """Each private name of torch → why it cannot be used; None: it can."""
    from fastbert import torch_private

    return {name: probe() for name, probe in torch_private.PROBES.items()}


def transformers_names() -> dict[str, str | None]:
    """Each private name of transformers → why it cannot be used; None: it can."""
    from fastbert import hf

    lacks = hf.missing()
    return {name: "not in this transformers" if name in lacks else None for name in hf.PROBES}


def op_backends() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Op → "device dtype" → backend, in the order they are tried → reasons why it refuses a small sample call."""
    from fastbert.dtypes import DTYPES
    from fastbert.ops import samples

    settings = [("cpu", "fp32"), ("cpu", "bf16")]
    if torch.cuda.is_available():
        settings += [("cuda", "fp32"), ("cuda", "fp16"), ("cuda", "bf16")]
    by_setting = {f"{device} {name}": samples.op_backends(device, DTYPES[name]) for device, name in settings}
    ops = next(iter(by_setting.values()))
    return {op: {setting: found[op] for setting, found in by_setting.items()} for op in ops}
