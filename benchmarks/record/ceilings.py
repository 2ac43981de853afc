"""Part "ceilings": what this device can do at most, by PyTorch's own kernels on random data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from benchmarks.record import card
from benchmarks.record.setting import Line, Setting
from benchmarks.record.timer import timed
from fastbert import bench, limits
from fastbert.dtypes import DTYPES

HIDDEN = {"base": 768, "large": 1024}
LAUNCHES = 1000


@torch.inference_mode()
def run(setting: Setting) -> Iterator[Line]:
    """Copy, a large square product, BERT's four products at few and many tokens, sustained, gaps between launches."""
    setting.bandwidth = limits.copy_bandwidth(setting.device, setting.megabytes)
    yield {"what": "copy", "bytes_per_second": setting.bandwidth, "megabytes": setting.megabytes}
    dtypes = ("bf16", "fp16", "fp32") if setting.on_cuda else ("fp32", "bf16")
    for dtype in dtypes:
        yield noted(setting, dtype, product(setting, setting.square, setting.square, setting.square, dtype))
    for model, hidden in {"tiny": 64}.items() if setting.dry_run else HIDDEN.items():
        for dtype in ("bf16", "fp32"):
            for tokens in (8, 16) if setting.dry_run else (32768, 2048, 128) if setting.on_cuda else (2048, 128):
                for name, n, k in products(hidden):
                    line = product(setting, tokens, n, k, dtype)
                    yield noted(setting, dtype, {"model": model, "product": name, **line})
    yield sustained(setting, dtypes[0])
    yield from gaps(setting)


def products(hidden: int) -> tuple[tuple[str, int, int], ...]:
    """(name, columns, depth) of a layer's products."""
    return (("qkv", 3 * hidden, hidden), ("out", hidden, hidden), ("ffn1", 4 * hidden, hidden),
            ("ffn2", hidden, 4 * hidden))  # fmt: skip


def operands(setting: Setting, tokens: int, n: int, k: int, dtype: str) -> tuple[torch.Tensor, ...]:
    """x, weight and bias of a product."""
    return tuple(torch.randn(*shape, device=setting.device).to(DTYPES[dtype]) for shape in ((tokens, k), (n, k), (n,)))


def product(setting: Setting, tokens: int, n: int, k: int, dtype: str) -> Line:
    """The rate of F.linear with a bias."""
    x, weight, bias = operands(setting, tokens, n, k, dtype)
    samples = timed(setting, {"F.linear": lambda: F.linear(x, weight, bias)})["F.linear"]
    seconds, flops = bench.summarize(samples.seconds), 2 * tokens * n * k
    found = {"tokens": tokens, "columns": n, "depth": k, "dtype": dtype, "seconds": seconds.median}
    return {"what": "F.linear", **found, "host_seconds": samples.host, "flops_per_second": flops / seconds.median}


def noted(setting: Setting, dtype: str, line: Line) -> Line:
    """The line, after its rate was taken for the dtype's peak if it is the best so far."""
    setting.peaks[dtype] = max(setting.peaks.get(dtype, 0.0), line["flops_per_second"])
    return line


def sustained(setting: Setting, dtype: str) -> Line:
    """Two seconds of one product without a pause, as a training run heats the card, and the card at its end."""
    tokens, hidden, wanted = (16, 64, 0.01) if setting.dry_run else (32768 if setting.on_cuda else 2048, 1024, 2.0)
    x, weight, bias = operands(setting, tokens, 4 * hidden, hidden, dtype)
    count, begin = 0, time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        answer = None
        while time.perf_counter() - begin < wanted:
            for _ in range(20):
                F.linear(x, weight, bias)
            count += 20
            if answer is None and time.perf_counter() - begin > wanted / 2:
                answer = pool.submit(card.asked, card.STATE, setting.place)
            limits.synchronize(setting.device)
        seconds = time.perf_counter() - begin
    line = {"what": "sustained", "product": "ffn1", "model": "large", "tokens": tokens, "dtype": dtype}
    line |= {"seconds": seconds, "flops_per_second": 8 * tokens * hidden**2 * count / seconds}
    return {**line, "nvidia_smi": answer.result() if answer else {"note": "it was over before nvidia-smi was asked"}}


def gaps(setting: Setting) -> Iterator[Line]:
    """Seconds from one small kernel to the next: launched one by one, and replayed as one CUDA graph."""
    launches = 20 if setting.dry_run else LAUNCHES
    x = torch.zeros(1024, device=setting.device)

    def chain() -> None:
        for _ in range(launches):
            x.add_(1)

    yield {"what": "launch gap", "kernels": launches, "seconds_per_kernel": best(setting, chain) / launches}
    if not setting.on_cuda:
        yield {"what": "graph gap", "note": f"there are no CUDA graphs on {setting.device}"}
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    yield {"what": "graph gap", "kernels": launches, "seconds_per_kernel": best(setting, graph.replay) / launches}
    nothing = timed(setting, {"nothing": lambda: None})["nothing"]
    yield {"what": "two events with nothing between them", "seconds": bench.summarize(nothing.seconds).median}


def best(setting: Setting, function: Callable[[], object]) -> float:
    """The fewest seconds of five runs, from the host's call to the device's end."""
    found = []
    for _ in range(6):
        limits.synchronize(setting.device)
        begin = time.perf_counter()
        function()
        limits.synchronize(setting.device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])
