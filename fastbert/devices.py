"""Which devices the fast path runs on, in words why not the others, and what card a proof is about."""

from __future__ import annotations

import functools
import platform

import torch

from fastbert import native

OLDEST = (7, 5)  # compute capability of the oldest card that kernels are compiled for
OTHERS = {"mps": "mps (an Apple GPU)", "xpu": "xpu (an Intel GPU)", "meta": "meta (shapes without values)"}


@functools.cache
def card(device: torch.device) -> str:
    """What a proof on a device, with its index, is about: "NVIDIA H200 (sm_90)", "x86_64 CPU (avx512_bf16)".

    The device itself, where torch cannot say more. Never raises.
    """
    if device.type == "cpu":
        isa = native.isa() if native.load().available else torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} CPU ({isa})"
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    except (AssertionError, RuntimeError, ValueError):
        return str(device)


@functools.cache
def refusals(device: torch.device) -> tuple[str, ...]:
    """Why the fast path does not run on a device, as what follows "on ..."; empty: it does. Never raises."""
    if device.type == "cpu":
        return ()
    if device.type != "cuda":
        name = OTHERS.get(device.type, device.type)
        return (f"{name}; the fast path runs on CPUs and NVIDIA GPUs",)
    try:
        name = torch.cuda.get_device_name(device)
        if torch.version.hip is not None:
            return (f"{name}, an AMD GPU (ROCm {torch.version.hip}); the fast path runs on CPUs and NVIDIA GPUs",)
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # tensors of a GPU that this process cannot reach
        return (f"{device}, of which torch can say nothing: {str(error).splitlines()[0]}",)
    if capability < OLDEST:
        return (f"{card(device)}; the fast path runs on NVIDIA GPUs from sm_{OLDEST[0]}{OLDEST[1]} on",)
    return ()
