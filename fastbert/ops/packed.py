"""A weight in the layout that a library multiplies fastest with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """weight [N, K] as oneDNN's blocked copies of its column ranges, which add up to it from left to right.

    Taken by the products in place of a plain weight, outside torch.compile.
    """

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def to_dense(self) -> Tensor:
        """The plain weight [N, K] again."""
        return torch.cat([part.to_dense() for part in self.parts], 1)
