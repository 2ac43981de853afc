"""What this machine can run, and in words why not more. Every part is guarded: the doctor itself never fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from fastbert.checkpoint import MissingModel, demo_folder
from fastbert.provenance import provenance


def examine() -> dict[str, Any]:
    """Versions, machine, devices, native library, Triton, private names, our kernels, every op's backends, for JSON."""
    return {
        "format": 1,
        "provenance": _guarded(provenance),
        "devices": _guarded(all_devices),
        "native": _guarded(native_library),
        "isa": _guarded(instruction_set),
        "triton": _guarded(triton),
        "demo": _guarded(demo),
        "private names of torch": _guarded(torch_names),
        "private names of transformers": _guarded(transformers_names),
        "kernels": _guarded(kernels),
        "ops": _guarded(op_backends),
    }


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def all_devices() -> dict[str, str | None]:
    """Each device that torch sees → why the fast path does not run there; None: it does."""
    from fastbert import devices

    found = [torch.device("cpu"), *cuda_devices()]
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found += [other] if other is not None and other.type != "cuda" else []
    return {str(device): "; ".join(devices.refusals(device)) or None for device in found}


def cuda_devices() -> list[torch.device]:
    """The CUDA devices that torch sees."""
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def native_library() -> dict[str, list[str]]:
    """Device type → why the native library has no kernels for it; empty: it has."""
    from fastbert import native

    return {device: native.refuse(device) for device in ("cpu", "cuda")}


def instruction_set() -> dict[str, str | None]:
    """Which instruction set the native library's kernels for CPUs use; None: there is no library."""
    from fastbert import native

    return {"cpu": native.isa() if native.load().available else None}


def triton() -> dict[str, Any]:
    """Triton's version, and why its kernels cannot run here (None: they can)."""
    if importlib.util.find_spec("triton") is None:
        return {"version": None, "reason": "triton is not installed"}
    import triton as module

    refused = [all_devices()[str(device)] for device in cuda_devices()]
    reason = None
    if all(refused):
        reason = refused[0] if refused else "Triton's kernels need a CUDA device, and torch sees none"
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
    """Each private name of transformers → why it cannot be used; None: it can.

    Raises:
        ImportError: nothing of transformers can be used.
    """
    from fastbert import hf

    if broken := hf.unusable():
        raise ImportError(broken)
    lacks = hf.missing()
    return {name: lacks.get(name) for name in hf.PROBES}


def kernels() -> list[dict[str, str]]:
    """Each kernel of ours in each dtype on each card: whether it is proven, checked, failed or not run, in words."""
    from fastbert import devices
    from fastbert.ops import samples, self_check

    found = []
    for kind, places in {"cpu": [torch.device("cpu")], "cuda": cuda_devices()}.items():
        for op, backend, dtype in samples.own_kernels(kind):
            line = {"kernel": op.name, "backend": backend.name, "dtype": self_check.name_of(dtype)}
            if not places:
                found.append({**line, "card": kind, "state": "not run", "words": f"torch sees no {kind} device"})
            for place in places:
                state, words = "not run", "; ".join(devices.refusals(place))
                words = words or "; ".join(backend.reasons(*self_check.apart(samples.typical, op, dtype, place)))
                if not words:
                    state, words = self_check.standing(op, backend, dtype, place)
                found.append({**line, "card": devices.card(place), "state": state, "words": words})
    return found


def op_backends() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Op → "device dtype" → backend, in the order they are tried → reasons why it refuses a small sample call."""
    from fastbert.dtypes import DTYPES
    from fastbert.ops import samples

    settings = [("cpu", "fp32"), ("cpu", "bf16")]
    if torch.cuda.is_available():
        settings += [("cuda:0", "fp32"), ("cuda:0", "fp16"), ("cuda:0", "bf16")]
    by_setting = {f"{device} {name}": samples.op_backends(device, DTYPES[name]) for device, name in settings}
    ops = next(iter(by_setting.values()))
    return {op: {setting: found[op] for setting, found in by_setting.items() if found} for op in ops}
