"""The int8 product as a module, which `quantize` puts at the place of an nn.Linear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.ops import reference
from fastbert.ops.encoder import ROTATED

EXACT_SHARE = 24  # of so many columns one stays in fp32


class QuantizedLinear(nn.Module):
    """An nn.Linear whose product is int8: x [..., K] → x·weightᵀ + bias [..., N]. For inference.

    Buffers: int8_weight [N, K] int8, scales [N] fp32, columns [C] int64, exact [N, C] fp32; bias [N] is a parameter
    without gradient. `.half()` and its like leave scales and exact in fp32.
    """

    int8_weight: Tensor
    scales: Tensor
    columns: Tensor
    exact: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, columns: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rotated = math.gcd(in_features, ROTATED)
        count = -(-in_features // EXACT_SHARE) if columns is None else columns
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32))
        self.register_buffer("columns", torch.arange(count))
        self.register_buffer("exact", torch.zeros(out_features, count, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, columns: Tensor) -> QuantizedLinear:
        """The quantized product of an nn.Linear, on its device; columns [C] of its input stay in fp32."""
        weight = linear.weight.detach().float()
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, columns.shape[0])
        made.columns, made.exact = columns.clone(), weight[:, columns].clone()
        rest = reference.rotate(weight.index_fill(1, columns, 0.0), made.rotated) / made.rotated
        made.scales = (rest.abs().amax(1) / 127).clamp(min=2.0**-126)
        made.int8_weight = (rest / made.scales[:, None]).round().to(torch.int8)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return made.train(linear.training)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        wide = {name: self._buffers[name] for name in ("scales", "exact")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in wide.items():
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
        weights = self.int8_weight, self.scales, self.bias, self.columns, self.exact, self.rotated
        y: Tensor = ops.quantized_linear(rows, *weights)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Its sizes, as nn.Linear shows them."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, exact={self.columns.shape[0]}"
