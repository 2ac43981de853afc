"""What a forward costs on paper (FLOPs, bytes), what this machine can do at most, and memory taken.

The counts are docs/design.md's: per layer and token 24·H² + 4·S·H FLOPs at I = 4·H, each sequence at its own length.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastbert import ops


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a forward's cost depends on."""

    layers: int
    hidden: int  # H
    intermediate: int  # I

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """From a BERT, RoBERTa or DistilBERT config."""
        intermediate = getattr(config, "intermediate_size", None) or config.hidden_dim
        return cls(int(config.num_hidden_layers), int(config.hidden_size), int(intermediate))


def encoder_flops(d: Dimensions, lengths: Iterable[int]) -> int:
    """Multiply-adds ×2 of the encoder's products on real tokens; embeddings, LayerNorm, GELU and heads are not counted.

    A layer costs a token 8·H² (QKV, out) + 4·H·I (FFN) + 4·L·H (both attention products, own length L).
    """
    per_token = 8 * d.hidden**2 + 4 * d.hidden * d.intermediate
    return d.layers * sum(n * per_token + 4 * n * n * d.hidden for n in lengths)


def weight_bytes(d: Dimensions, itemsize: int) -> int:
    """The encoder's weight matrices, read once a forward."""
    return d.layers * (4 * d.hidden**2 + 2 * d.hidden * d.intermediate) * itemsize


def fused_bytes(d: Dimensions, tokens: int, itemsize: int) -> int:
    """Bytes that the fast path moves: per layer and token 18·H + 2·I elements (26·H at I = 4·H), and the weights."""
    return d.layers * tokens * (18 * d.hidden + 2 * d.intermediate) * itemsize + weight_bytes(d, itemsize)


def stock_bytes(d: Dimensions, padded_tokens: int, itemsize: int) -> int:
    """Bytes that the stock model moves with SDPA: 24·H + 4·I elements (40·H at I = 4·H) per padded token."""
    return d.layers * padded_tokens * (24 * d.hidden + 4 * d.intermediate) * itemsize + weight_bytes(d, itemsize)


def synchronize(device: str) -> None:
    """Waits for a CUDA device; nothing on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """The fewest of `repeats` calls, after one that is not counted."""
    run()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


@torch.inference_mode()
def gemm_peak(
    d: Dimensions, dtype: torch.dtype, device: str = "cpu", tokens: int = 2048, repeats: int = 10
) -> dict[str, Any]:
    """The best rate found on the model's own four products at `tokens` rows, in FLOP/s.

    On a CPU the better of F.linear and ops.linear with a packed weight; on CUDA F.linear (a plain matmul). Every
    rate found is in "rates"; "flops_per_second" is the largest.
    """
    h, i = d.hidden, d.intermediate
    rates: dict[str, float] = {}
    for n, k in dict.fromkeys(((3 * h, h), (h, h), (i, h), (h, i))):
        x = torch.randn(tokens, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        ways: dict[str, tuple[Callable[..., Any], torch.Tensor | ops.PackedWeight]] = {"F.linear": (F.linear, weight)}
        if device == "cpu":
            ways["ops.linear packed"] = (ops.linear, ops.pack_weight(weight))
        for name, (product, w) in ways.items():
            seconds = best_seconds(lambda p=product, w=w, x=x: p(x, w), device, repeats)  # type: ignore[misc]
            rates[f"{name} [{tokens}, {k}] x [{k}, {n}]"] = 2.0 * tokens * n * k / seconds
    best = max(rates, key=lambda name: rates[name])
    return {"flops_per_second": rates[best], "where": best, "rates": rates}


@torch.inference_mode()
def copy_bandwidth(device: str = "cpu", megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes read plus bytes written per second by a plain copy much larger than any cache."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, repeats)
    return 2.0 * source.numel() * 4 / seconds


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes that `run` takes at its peak above what was held before; None where the system cannot say.

    CUDA: torch's allocator. Linux: the process's high-water mark, reset before the run (/proc/self/clear_refs); pages
    that an earlier call left with the C library's allocator are given back first, so that they count.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):  # the last on Windows
        return None
    held = _status_bytes("VmRSS")
    run()
    return max(_status_bytes("VmHWM") - held, 0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
