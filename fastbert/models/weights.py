"""A layer's parameters as the ops take them: q, k and v as one product, in the compute dtype, packed on a CPU.

Copies are kept only of matrices, and checked at every forward: against each parameter's address and version, which
optimizer steps, `load_state_dict` and in-place edits change, and against a sample of its values, because edits through
`.data` (LoRA merges) change neither.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops, torch_private
from fastbert.layers import LayerWeights
from fastbert.models.families import Family
from fastbert.ops import PackedWeight

SAMPLES = 512
_fusing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A matrix made from parameters, and what they were when it was made."""

    tensor: Tensor | PackedWeight
    stamp: tuple[object, ...]
    samples: tuple[Tensor, ...]


def sample(weight: Tensor) -> Tensor:
    """At most about SAMPLES values spread evenly over weight [N, K]."""
    size = weight.numel()
    step = max(1, size // SAMPLES) | 1  # odd, so that it is not one column that is always seen
    flat = weight if weight.is_contiguous() else weight.contiguous()
    return flat.as_strided((-(-size // step),), (step,))


class MatrixCache:
    """The prepared matrices of one model, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, Prepared] = {}

    def get(self, name: str, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | PackedWeight:
        """parameters [N_i, K] → their rows in one matrix [ΣN_i, K] of `dtype`, packed for the backend "torch"."""
        stamp = (dtype, *((p.data_ptr(), torch_private.version(p)) for p in parameters))
        entry = self.entries.get(name)
        if entry is not None and entry.stamp == stamp and self.unchanged(entry, parameters):
            return entry.tensor
        tensor = ops.pack_weight(torch.cat([p.detach().to(dtype) for p in parameters]))
        self.entries[name] = Prepared(tensor, stamp, tuple(sample(p).clone() for p in parameters))
        return tensor

    @staticmethod
    def unchanged(entry: Prepared, parameters: tuple[Tensor, ...]) -> bool:
        """Whether the sampled values of all parameters are what they were."""
        return all(torch.equal(old, sample(p)) for old, p in zip(entry.samples, parameters, strict=True))

    def nbytes(self) -> int:
        """Memory held by the copies, in bytes."""
        return sum(entry.tensor.nbytes for entry in self.entries.values())


def is_fused(parameters: tuple[Tensor, ...]) -> bool:
    """Whether the parameters are neighbours in one buffer."""
    first = parameters[0]
    if not all(p.is_contiguous() and p.dtype == first.dtype and p.device == first.device for p in parameters):
        return False
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for p in parameters:
        if p.untyped_storage().data_ptr() != storage or p.data_ptr() != end:
            return False
        end += p.numel() * p.element_size()
    return True


def fused(parameters: tuple[Tensor, ...]) -> Tensor:
    """parameters [N_i, ...] → one tensor [ΣN_i, ...] that shares their memory; they become views of it if they are not.

    Their identity as `nn.Parameter`, their names and their shapes stay.
    """
    with _fusing:
        if not is_fused(parameters):
            buffer = torch.cat([p.detach() for p in parameters])
            for p, rows in zip(parameters, torch.split(buffer, [p.shape[0] for p in parameters]), strict=True):
                p.data = rows
    first = parameters[0].detach()
    shape = (sum(p.shape[0] for p in parameters), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def unfuse(parameters: tuple[Tensor, ...]) -> None:
    """Gives each parameter memory of its own again."""
    with _fusing:
        if is_fused(parameters):
            for p in parameters:
                p.data = p.detach().clone()


def at(module: Any, path: str) -> Any:
    """The submodule at an attribute path such as "attention.self.query"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    """gamma [H], beta [H], eps of an nn.LayerNorm."""
    return module.weight, module.bias, module.eps


@dataclass(frozen=True, slots=True)
class LayerModules:
    """The modules of one layer that the fast path reads."""

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm1: nn.LayerNorm
    w1: nn.Linear
    activation: nn.Module
    w2: nn.Linear
    norm2: nn.LayerNorm


def layer_modules(layer: nn.Module, family: Family) -> LayerModules:
    """Finds a layer's modules by the paths of its family."""
    paths = (getattr(family, name) for name in LayerModules.__slots__)
    return LayerModules(*(at(layer, path) for path in paths))


def cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """bias [N] in the compute dtype."""
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def read_layer(
    modules: LayerModules, heads: int, scale: float, approximate: str, name: str, cache: MatrixCache, dtype: torch.dtype
) -> LayerWeights:
    """The parameters of one layer as they are now, in the compute dtype. Call it under torch.no_grad()."""
    qkv = (modules.query, modules.key, modules.value)
    weights, biases = tuple(m.weight for m in qkv), tuple(m.bias for m in qkv)
    if keeps_copies(weights[0], dtype):
        qkv_weight = cache.get(f"{name}.qkv", weights, dtype)
        out_weight = cache.get(f"{name}.out", (modules.out.weight,), dtype)
        w1 = cache.get(f"{name}.w1", (modules.w1.weight,), dtype)
        w2 = cache.get(f"{name}.w2", (modules.w2.weight,), dtype)
    else:
        qkv_weight = fused(weights)
        out_weight, w1, w2 = modules.out.weight, modules.w1.weight, modules.w2.weight
    return LayerWeights(
        heads=heads,
        scale=scale,
        approximate=approximate,
        qkv_weight=qkv_weight,
        qkv_bias=None if biases[0] is None else cast(torch.cat(biases), dtype),
        out_weight=out_weight,
        out_bias=cast(modules.out.bias, dtype),
        norm1=norm(modules.norm1),
        w1=w1,
        b1=cast(modules.w1.bias, dtype),
        w2=w2,
        b2=cast(modules.w2.bias, dtype),
        norm2=norm(modules.norm2),
    )


def keeps_copies(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` need copies of the matrices: another dtype (autocast), or a CPU that packs them."""
    packs = weight.device.type == "cpu" and torch_private.packed_linear_refusal(dtype) is None
    return packs or weight.dtype != dtype
