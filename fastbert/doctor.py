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
    from fastbert import ops

    settings = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        settings += [("cuda", torch.float32), ("cuda", torch.float16), ("cuda", torch.bfloat16)]
    found: dict[str, dict[str, dict[str, list[str]]]] = {op.name: {} for op in ops.ALL}
    for device, dtype in settings:
        arguments = sample_arguments(device, dtype)
        for op in ops.ALL:
            order = op.order(device)
            found[op.name][f"{device} {str(dtype).removeprefix('torch.')}"] = {
                backend.name: backend.reasons(*arguments[op.name]) for backend in order
            }
    return found


def sample_arguments(device: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """For each op, the arguments of a call as BERT-base makes it: 2 sequences of 3 and 5 tokens, 12 heads of 64."""
    tokens, hidden, inner = 8, 768, 3072

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    ids = zeros(tokens, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5], device=device)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    x, gain, weight = zeros(tokens, hidden), zeros(hidden), zeros(hidden, hidden)
    first, second, bias = zeros(inner, hidden), zeros(hidden, inner), zeros(inner)
    return {
        "unpad": (mask,),
        "pad": (x, torch.arange(tokens, device=device), 2, 5),
        "embed_layer_norm": (ids, ids, ids, weight, weight, weight, gain, gain, 1e-12),
        "attention": (zeros(tokens, 3, 12, 64), bounds, 5, 0.125),
        "add_layer_norm": (x, gain, x, gain, gain, 1e-12),
        "linear": (x, weight, gain),
        "linear_gelu": (x, first, bias),
        "feed_forward": (x, first, bias, second, gain),
    }
