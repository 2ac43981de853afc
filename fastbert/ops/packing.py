"""For which backend weights are packed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import builtins, cpu
from fastbert.ops.declare import encoder_forward, linear, quantized_linear
from fastbert.ops.packed import PackedWeight
from fastbert.ops.registry import Backend, Op


def packs(op: Op, backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend's products in a dtype are faster on packed copies of weights, and may run."""
    if backend.pack is None:
        return False
    if backend.name == "torch":
        return builtins.packs(device.type, dtype)
    kind = torch.int8 if op is quantized_linear else dtype
    return not cpu.pack_reasons(kind) and not op.verdict(backend, dtype, device)


def packer(device: torch.device, dtype: torch.dtype, op: Op = linear) -> str:
    """The name of the backend that weights are packed for: the first that may run a product and packs; "": none.

    dtype: of x. op: `linear`, or `quantized_linear`, whose weights are int8.
    """
    return next((b.name for b in op.candidates(device.type) if packs(op, b, device, dtype)), "")


def encodes(device: torch.device, dtype: torch.dtype, quantized: bool = False) -> bool:
    """Whether all layers may be one call, on weights that are packed for the native library.

    dtype: of the products; quantized: their weights are int8.
    """
    if packer(device, dtype, quantized_linear if quantized else linear) != "cpu":
        return False
    chosen = next(iter(encoder_forward.candidates(device.type)), None)
    return chosen is not None and chosen.name == "cpu" and not encoder_forward.verdict(chosen, dtype, device)


def pack_weight(weight: Tensor, backend: str = "") -> Tensor | PackedWeight:
    """weight [N, K] as a backend multiplies fastest with it, by default `packer`'s; itself where none packs it.

    Raises:
        ValueError: there is no such backend, or it packs no weights.
    """
    op = quantized_linear if weight.dtype == torch.int8 else linear
    name = backend or packer(weight.device, torch.float32 if op is quantized_linear else weight.dtype, op)
    if not name:
        return weight.detach()
    found = op.backends.get(name)
    if found is None or found.pack is None:
        raise ValueError(f"backend {name!r} packs no weights")
    return found.pack(weight)
