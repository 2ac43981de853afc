"""For which backend weights are packed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import builtins, cpu
from fastbert.ops.declare import encoder_forward, linear
from fastbert.ops.packed import PackedWeight
from fastbert.ops.registry import Backend


def packs(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend's products are faster on packed copies of weights of this dtype, and may run."""
    if backend.pack is None:
        return False
    if backend.name == "torch":
        return builtins.packs(device.type, dtype)
    return not cpu.pack_reasons(dtype) and not linear.verdict(backend, dtype, device)


def packer(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that weights are packed for: the first that may run a product and packs; "": none."""
    return next((b.name for b in linear.candidates(device.type) if packs(b, device, dtype)), "")


def encodes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all layers may be one call, on weights that are packed for the native library."""
    if packer(device, dtype) != "cpu":
        return False
    chosen = next(iter(encoder_forward.candidates(device.type)), None)
    return chosen is not None and chosen.name == "cpu" and not encoder_forward.verdict(chosen, dtype, device)


def pack_weight(weight: Tensor, backend: str = "") -> Tensor | PackedWeight:
    """weight [N, K] as a backend multiplies fastest with it, by default `packer`'s; itself where none packs it.

    Raises:
        ValueError: there is no such backend, or it packs no weights.
    """
    name = backend or packer(weight.device, weight.dtype)
    if not name:
        return weight.detach()
    found = linear.backends.get(name)
    if found is None or found.pack is None:
        raise ValueError(f"backend {name!r} packs no weights")
    return found.pack(weight)
