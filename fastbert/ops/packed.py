"""A weight in the layout that a library multiplies fastest with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class PackedWeight:
    """weight [N, K] as oneDNN's blocked copies of its column ranges, whose products add up to those with it.

    Taken by the products in place of a plain weight, outside torch.compile.

    Args:
        parts: the column ranges from left to right, packed.
        plain: the weight itself, where it is at hand without a copy.
    """

    parts: tuple[Tensor, ...]
    plain: Tensor | None = None
    shape: torch.Size = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)))
        self.dtype = self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Memory held by the copies, in bytes."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def to_dense(self) -> Tensor:
        """The plain weight [N, K] again."""
        return torch.cat([part.to_dense() for part in self.parts], 1)
