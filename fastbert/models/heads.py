"""Heads whose loss is over tokens: their forward keeps HuggingFace's pad rows in the calls whose loss reads them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastbert import torch_private
from fastbert.models.families import CAUSAL_HEADS, FAMILIES
from fastbert.models.forward import exact_call, positional_parameters

HEADS = frozenset(name for family in FAMILIES for name in family.heads)
TOKEN_HEADS = frozenset(name for family in FAMILIES for name in family.token_heads)
IGNORED = -100  # the label that HuggingFace's losses leave out


def make_head_forward(stock: type[Any]) -> Any:
    """The forward of a head whose loss is over tokens: the stock one, with pad rows exact where the loss reads them."""
    names = positional_parameters(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch_private.transforms_active():
            return stock.forward(self, *args, **kwargs)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        token = exact_call.set(pad_rows_reason(stock.__name__, inputs.get("labels"), inputs.get("attention_mask")))
        try:
            return stock.forward(self, *args, **kwargs)
        finally:
            exact_call.reset(token)

    return forward


def pad_rows_reason(head: str, labels: Any, mask: Any) -> str:
    """Why the loss over tokens of a head reads rows of padding; empty: it does not, or nobody can tell without a sync.

    Values are looked at on a CPU only.
    """
    if type(labels) is not Tensor or type(mask) is not Tensor or labels.numel() != mask.numel():
        return ""
    if head.endswith(CAUSAL_HEADS):  # the row before a label predicts it, and may be masked where the label is not
        return "labels were given to a causal head, whose loss may read pad rows"
    if labels.device.type == mask.device.type == "cpu":
        labelled = labels.reshape(mask.shape) != IGNORED
        if bool((labelled & (mask == 0)).any()):
            return "labels other than -100 stand at masked positions, where the loss reads pad rows"
    return ""
