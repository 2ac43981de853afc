"""The int8 product as a module, which stands at the place of every nn.Linear of a quantized model's layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.models.families import Family
from fastbert.ops import reference
from fastbert.ops.encoder import ROTATED

OUTLIER_SHARE = 16  # of so many columns one stays in bf16
METHOD = "fastbert"  # the quant_method in the quantization_config of config.json
KEPT = {"scales": torch.float32, "outliers": torch.bfloat16}  # buffers that stay so whatever a model's dtype is


def outlier_count(columns: int, share: int = OUTLIER_SHARE) -> int:
    """How many of a product's columns stay in bf16."""
    return -(-columns // share)


class QuantizedLinear(nn.Module):
    """An nn.Linear whose product is int8: x [..., K] → x·weightᵀ + bias [..., N]. For inference.

    Buffers: int8_weight [N, K] int8, scales [N] fp32, columns [C] int64, outliers [N, C] bf16; bias [N] is a
    parameter without gradient. `.half()` and its like leave scales and outliers as they are.
    """

    int8_weight: Tensor
    scales: Tensor
    columns: Tensor
    outliers: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, columns: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rotated = math.gcd(in_features, ROTATED)
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32))
        self.register_buffer("columns", torch.arange(columns))
        self.register_buffer("outliers", torch.zeros(out_features, columns, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, columns: Tensor) -> QuantizedLinear:
        """The quantized product of an nn.Linear, on its device; columns [C] of its input stay in bf16."""
        weight = linear.weight.detach().float()
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, columns.shape[0])
        made.columns, made.outliers = columns.clone(), weight[:, columns].to(torch.bfloat16)
        rest = reference.rotate(weight.index_fill(1, columns, 0.0), made.rotated) / made.rotated
        made.scales = (rest.abs().amax(1) / 127).clamp(min=2.0**-126)
        made.int8_weight = (rest / made.scales[:, None]).round().to(torch.int8)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return made.train(linear.training)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        kept = {name: self._buffers[name] for name in KEPT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype, autocast's where it is on.

        Raises:
            NotImplementedError: in the backward, where x wants a gradient.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.reshape(-1, self.in_features)
        weights = self.int8_weight, self.scales, self.bias, self.columns, self.outliers, self.rotated
        y: Tensor = ops.quantized_linear(rows, *weights)
        return y.view(*x.shape[:-1], self.out_features)

    def after_loading(self, name: str) -> None:
        """Looks at tensors that came from a checkpoint, and makes them what `of` makes. name: for errors.

        Raises:
            ValueError: they are none that `of` makes.
        """
        if self.bias is not None:
            self.bias.requires_grad_(False)
        for key, dtype in KEPT.items():
            if (loaded := self.get_buffer(key).dtype) != dtype:
                raise ValueError(f"{name}.{key} was loaded in {loaded} and not in {dtype}")
        if self.columns.is_meta or self.scales.is_meta:  # offloaded: nothing to look at
            return
        steps = torch.cat([self.columns.new_tensor([-1]), self.columns, self.columns.new_tensor([self.in_features])])
        if self.columns.dtype != torch.int64 or not bool((steps.diff() > 0).all()):
            raise ValueError(f"the checkpoint is damaged: {name}.columns does not rise below {self.in_features}")
        if not bool((self.scales.isfinite() & (self.scales > 0)).all()):
            raise ValueError(f"the checkpoint is damaged: {name}.scales are not all finite and above 0")

    def extra_repr(self) -> str:
        """Its sizes, as nn.Linear shows them."""
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, outliers={self.columns.shape[0]}"


def linears(base: Any, family: Family) -> Iterator[tuple[str, Any]]:
    """The linear modules of a base model's layers with their paths from it."""
    for index in range(len(base.get_submodule(family.layers))):
        for path in family.linears():
            yield (whole := f"{family.layers}.{index}.{path}"), base.get_submodule(whole)


def put(base: Any, path: str, made: nn.Module) -> None:
    """Another module at the place of the one at a path from a base model."""
    parent, _, leaf = path.rpartition(".")
    setattr(base.get_submodule(parent), leaf, made)


def says_int8(config: Any) -> bool:
    """Whether a model's config says that fastbert has quantized it; its quantization_config may be a dict."""
    found = getattr(config, "quantization_config", None)
    return (found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)) == METHOD
