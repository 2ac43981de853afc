"""Weights in the layout that a backend multiplies fastest with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32  # csrc/linear.h's: rows of a weight that stand side by side
NUMBERS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # in a word of 4 bytes


class PackedWeight:
    """weight [N, K] packed; taken by the products in place of a plain weight, outside torch.compile.

    Attributes:
        shape, dtype: the weight's.
        plain: the weight itself, where it is at hand without a copy.
    """

    shape: torch.Size
    dtype: torch.dtype
    plain: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory held by the copies, in bytes."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The plain weight [N, K] again."""
        raise NotImplementedError


@dataclass(slots=True, eq=False)
class OneDNNWeight(PackedWeight):
    """A weight as oneDNN's blocked copies of its column ranges, whose products add up to those with it.

    Args:
        parts: the column ranges from left to right, packed.
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
        return sum(part.numel() * part.element_size() for part in self.parts)

    def to_dense(self) -> Tensor:
        return torch.cat([part.to_dense() for part in self.parts], 1)


@dataclass(slots=True, eq=False)
class PanelWeight(PackedWeight):
    """A weight in panels of rows, as the native library's products read it.

    Args:
        panels: `panels_of` it; of a float16 weight in float32.
        sums: of an int8 weight the sums of its rows [N] int32.
    """

    panels: Tensor
    shape: torch.Size
    dtype: torch.dtype
    plain: Tensor | None = None
    sums: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.sums is None else self.sums.nbytes)

    def to_dense(self) -> Tensor:
        return from_panels(self.panels, self.shape).to(self.dtype)


def panels_of(weight: Tensor) -> Tensor:
    """weight [N, K] → [panels, words, PANEL, numbers in a word], zeros behind its rows and columns (a copy)."""
    rows, columns = weight.shape
    each = NUMBERS[weight.dtype]
    words = -(-columns // each)
    filled = F.pad(weight, (0, words * each - columns, 0, -rows % PANEL))
    return filled.view(-1, PANEL, words, each).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`panels_of` a weight of this shape → the weight (a copy)."""
    rows, columns = shape
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


Pack = Callable[[Tensor], Tensor | PackedWeight]
