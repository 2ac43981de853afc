"""Seconds of candidates in turns: on a GPU by events around each call, elsewhere by the host's clock.

Before each call on a GPU a buffer several times as large as its L2 cache is written, as often as the host needs to
launch the call: the call's data does not stand in the cache, and no gap between its launches is measured. What the host
takes for a call is measured beside it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.record.setting import Line, Setting, as_line
from fastbert import bench

FLUSH_SECONDS = 40e-6  # writing the buffer takes longer on any card there is
MOST_FLUSHES, SAMPLED_SECONDS = 100, 0.25
Candidates = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Samples:
    """Seconds per call; host: what the host takes for a call, without waiting for the device (None: no device)."""

    seconds: list[float]
    host: float | None = None


def timed(setting: Setting, candidates: Candidates) -> dict[str, Samples]:
    """Interleaved samples of every candidate."""
    return on_cuda(setting, candidates) if setting.on_cuda else on_host(setting, candidates)


def on_host(setting: Setting, candidates: Candidates, inner: int | None = None) -> dict[str, Samples]:
    """From call to result on the host; short calls are repeated inside a sample to about 2 ms, or `inner` times."""
    runs = {name: lambda i, run=run: run() for name, run in candidates.items()}  # type: ignore[misc]
    once = bench.interleave(runs, 1, device=setting.device)
    shortest = min(seconds[0] for seconds in once.values())
    inner = inner or (1 if setting.dry_run else max(1, min(200, round(2e-3 / max(shortest, 1e-7)))))
    found = bench.interleave(runs, setting.rounds, warmup=2, inner=inner, device=setting.device)
    return {name: Samples(seconds) for name, seconds in found.items()}


def on_cuda(setting: Setting, candidates: Candidates) -> dict[str, Samples]:
    """On the device alone."""
    flush, host = cache_buffer(setting.place), {}
    for name, run in candidates.items():
        for _ in range(3):  # the first compile and choose
            torch.cuda.synchronize(setting.place)
            begin = time.perf_counter()
            run()
            host[name] = time.perf_counter() - begin
        torch.cuda.synchronize(setting.place)
    longest = max(host.values()) * 2 + FLUSH_SECONDS
    rounds = max(10, min(setting.rounds, round(SAMPLED_SECONDS / longest)))
    events = []
    for _ in range(rounds):
        for name, run in candidates.items():
            for _ in range(min(MOST_FLUSHES, 1 + math.ceil(1.5 * host[name] / FLUSH_SECONDS))):
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize(setting.place)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for name, start, end in events:
        seconds[name].append(start.elapsed_time(end) * 1e-3)
    return {name: Samples(found, host[name]) for name, found in seconds.items()}


@functools.cache
def cache_buffer(place: torch.device) -> torch.Tensor:
    """Four times the L2 cache, at least 256 MB."""
    size = max(4 * getattr(torch.cuda.get_device_properties(place), "L2_cache_size", 0), 2**28)
    with torch.inference_mode(False):  # or it could not be written outside of that mode
        return torch.empty(size, dtype=torch.int8, device=place)


def figures(samples: Samples, base: Samples) -> Line:
    """Summary, ratio to the base, what the host took, raw samples."""
    return {
        "seconds": as_line(bench.summarize(samples.seconds)),
        "host_seconds": samples.host,
        "speedup": as_line(bench.ratio(base.seconds, samples.seconds, draws=400)),
        "samples": samples.seconds,
    }
