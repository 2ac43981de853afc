"""What products can do on this machine at most: the share of a peak is taken of the best that anyone's product does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastbert import limits, torch_private
from fastbert.dtypes import DTYPES
from fastbert.limits import Dimensions

BERT_BASE, TINY = Dimensions(1, 768, 3072), Dimensions(1, 64, 256)
TOKENS, REPEATS = 1024, 10


def peaks(dtypes: Sequence[str], dry_run: bool = False) -> dict[str, Any]:
    """dtype → {"flops_per_second", "where", "rates"}: the best of F.linear, ours and oneDNN on packed weights.

    At BERT-base's four products, whatever the model. Where int8 cannot be measured: {"reason"}.
    """
    sizes, tokens, repeats = (TINY, 16, 1) if dry_run else (BERT_BASE, TOKENS, REPEATS)
    found = {}
    for dtype in dtypes:
        try:
            rates = int8(sizes, tokens, repeats) if dtype == "int8" else floats(sizes, DTYPES[dtype], tokens, repeats)
            where = max(rates, key=lambda name: rates[name])
            found[dtype] = {"flops_per_second": rates[where], "where": where, "rates": rates}
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            found[dtype] = {"reason": f"no product in {dtype} could be timed: {str(error).splitlines()[0]}"}
    return found


@torch.inference_mode()
def floats(sizes: Dimensions, dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, float]:
    rates: dict[str, float] = limits.gemm_peak(sizes, dtype, "cpu", tokens, repeats)["rates"]
    if torch_private.packed_linear_refusal(dtype) is None:
        for n, k in products(sizes):
            x, weight = torch.randn(tokens, k).to(dtype), torch_private.pack_linear_weight(torch.randn(n, k).to(dtype))
            run = partial(torch_private.packed_linear, x, weight, None)
            rates |= rate("oneDNN packed", run, tokens, n, k, repeats)
    return rates


@torch.inference_mode()
def int8(sizes: Dimensions, tokens: int, repeats: int) -> dict[str, float]:
    """oneDNN's product of uint8 and packed int8, a scale a column, into fp32."""
    rates: dict[str, float] = {}
    for n, k in products(sizes):
        x = torch.randint(0, 256, (tokens, k), dtype=torch.uint8)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, [tokens, k])
        scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int32)
        run = partial(
            torch.ops.onednn.qlinear_pointwise,
            x, 0.01, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        rates |= rate("onednn.qlinear_pointwise", run, tokens, n, k, repeats)
    return rates


def products(d: Dimensions) -> tuple[tuple[int, int], ...]:
    """(columns, depth) of a layer's products."""
    return (3 * d.hidden, d.hidden), (d.hidden, d.hidden), (d.intermediate, d.hidden), (d.hidden, d.intermediate)


def rate(name: str, run: Callable[[], object], tokens: int, n: int, k: int, repeats: int) -> dict[str, float]:
    seconds = limits.best_seconds(run, "cpu", repeats)
    return {f"{name} [{tokens}, {k}] x [{k}, {n}]": 2.0 * tokens * n * k / seconds}
