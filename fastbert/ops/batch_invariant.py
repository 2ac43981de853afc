"""The mode in which a text's outputs do not depend, to the last bit, on the texts beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastbert.ops.declare import linear
from fastbert.ops.registry import BATCH_INVARIANT, _forced


class _Products(TorchFunctionMode):
    """Sends F.linear, which poolers, heads and LoRA's modules call, to the op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by the op: input [..., K], weight [N, K], bias [N] → [..., N], in autocast's dtype where it is on."""
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = linear(input.reshape(-1, input.shape[-1]), weight, bias)
    return y.view(*input.shape[:-1], weight.shape[0])


@contextlib.contextmanager
def use_batch_invariant() -> Iterator[None]:
    """In this context (and thread) a text's outputs do not depend, to the last bit, on the texts beside it.

    Products and attention run by Triton's kernels, whose tiles do not depend on the batch and which do not split sums;
    the products of poolers and heads too. On GPUs from sm_80 on, for accelerated models; HuggingFace's own forward,
    where `fastbert.explain` says that it runs, is not covered. What it costs in speed is unmeasured.

    Raises:
        BackendRefused: at a call, where Triton's kernels do not run on the device, such as a CPU.
    """
    token = _forced.set(BATCH_INVARIANT)
    try:
        with _Products():
            yield
    finally:
        _forced.reset(token)
