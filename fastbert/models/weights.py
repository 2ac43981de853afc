"""A layer's parameters as the ops take them: q, k and v as one product, in the compute dtype, packed on a CPU.

Copies are kept of matrices only, on a CPU that packs them only, and checked at every forward: against each parameter's
address and version, which optimizer steps, `load_state_dict` and in-place edits change, and against a sample of its
values, because edits through `.data` (LoRA merges), numpy views and shared memory change neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastbert import hf, ops, torch_private
from fastbert.layers import LayerWeights
from fastbert.models.structure import LayerModules
from fastbert.ops import PackedWeight
from fastbert.torch_private import parameter

SAMPLES = 512


@dataclass(frozen=True, slots=True)
class Prepared:
    """A matrix made from parameters, and what they were when it was made.

    `live` are views of samples of the parameters, `samples` what they held. The views keep the parameters' memory, so
    that its address is not given to others.
    """

    tensor: Tensor | PackedWeight
    stamp: tuple[object, ...]
    samples: tuple[Tensor, ...]
    live: tuple[Tensor, ...]


def sample(weight: Tensor) -> Tensor:
    """A view of about SAMPLES values spread over weight [N, K]."""
    rows, columns = weight.shape
    if weight.is_contiguous():
        step = max(1, rows * columns // SAMPLES) | 1  # odd, so that it is not one column that is always seen
        return weight.detach().view(-1)[::step]
    return weight.detach()[:: max(1, rows // 23), :: max(1, columns // 23)]


class MatrixCache:
    """The prepared matrices of one model, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, Prepared] = {}

    def get(self, name: str, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | PackedWeight:
        """parameters [N_i, K] → their rows in one matrix [ΣN_i, K] of `dtype`, as the backend "torch" packs it."""
        if not keeps_copies(parameters, dtype):
            self.entries.pop(name, None)
            return joined(parameters, dtype)
        stamp = (dtype, *[(p.data_ptr(), p.shape, p.stride(), torch_private.version(p)) for p in parameters])
        entry = self.entries.get(name)
        if entry is not None and entry.stamp == stamp and all(map(torch.equal, entry.samples, entry.live)):
            return entry.tensor
        tensor = ops.pack_weight(joined(parameters, dtype))
        live = tuple(sample(p) for p in parameters)
        self.entries[name] = Prepared(tensor, stamp, tuple(view.clone() for view in live), live)
        return tensor

    def nbytes(self) -> int:
        """Memory held by the copies, in bytes."""
        return sum(entry.tensor.nbytes for entry in tuple(self.entries.values()))


def keeps_copies(parameters: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether packed copies are kept. Inference tensors have no version that would tell of a change."""
    first = parameters[0]
    packs = ops.packs(first.device.type, dtype) and first.numel() > 0
    return packs and not any(p.is_inference() for p in parameters)


def joined(parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """parameters [N_i, ...] → [ΣN_i, ...] of `dtype`."""
    whole = torch.cat(parameters) if len(parameters) > 1 else parameters[0]
    return whole if whole.dtype == dtype else whole.to(dtype)


def norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    """gamma [H], beta [H], eps of an nn.LayerNorm."""
    return parameter(module, "weight"), parameter(module, "bias"), module.eps


def read_layer(modules: LayerModules, name: str, cache: MatrixCache, dtype: torch.dtype) -> LayerWeights:
    """The parameters of one layer as they are now, in the compute dtype. Call it under torch.no_grad()."""
    qkv = (modules.query, modules.key, modules.value)
    out, first, second = modules.out, modules.w1, modules.w2
    dim = int(modules.attention.attention_head_size)
    scale = getattr(modules.attention, "scaling", dim**-0.5)

    def bias(*linears: nn.Linear) -> Tensor | None:
        biases = tuple(parameter(m, "bias") for m in linears)
        return None if biases[0] is None else joined(biases, dtype)

    def weight(place: str, *linears: nn.Linear) -> Tensor | PackedWeight:
        return cache.get(f"{name}.{place}", tuple(parameter(m, "weight") for m in linears), dtype)

    return LayerWeights(
        heads=modules.query.weight.shape[0] // dim,
        scale=float(scale),
        approximate=hf.gelu_of(modules.activation) or "none",
        qkv_weight=weight("qkv", *qkv),
        qkv_bias=bias(*qkv),
        out_weight=weight("out", out),
        out_bias=bias(out),
        norm1=norm(modules.norm1),
        w1=weight("w1", first),
        b1=bias(first),
        w2=weight("w2", second),
        b2=bias(second),
        norm2=norm(modules.norm2),
    )
