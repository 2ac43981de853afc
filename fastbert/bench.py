"""Timing as a library: interleaved rounds, medians and quantiles, ratios pair by pair, rows that need parity.

Candidates run A B A B: what disturbs the machine for a while disturbs all of them, and a ratio is taken between
neighbours in time. Raw samples are kept.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fastbert import limits

Name = TypeVar("Name")
Progress = Callable[[str, int, int], None]  # (what, done, of)


def quiet(what: str, done: int, of: int) -> None:
    """A progress that shows nothing."""


@dataclass(frozen=True)
class Gate:
    """Whether outputs agree with the reference, and in words how closely."""

    passed: bool
    words: str


@dataclass(frozen=True)
class Summary:
    """Seconds of one candidate."""

    median: float
    p10: float
    p90: float
    total: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """How many times longer `base` took than `ours`.

    `median` is over pairs of neighbouring samples, `low` and `high` its 95% interval (bootstrap over pairs; None for
    samples that are no pairs), `of_totals` is total time over total time.
    """

    of_totals: float
    median: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SpeedRow:
    """One line of a speed table. `seconds` and all that follows from it is None where parity failed."""

    workload: str
    engine: str
    dtype: str
    parity: Gate | None  # None: this row is the base that others are compared with
    fill: float
    texts: int
    real_tokens: int
    padded_tokens: int
    flops: int  # on real tokens
    bytes_moved: int
    relative_error: float | None = None
    note: str = ""
    seconds: Summary | None = None
    texts_per_second: float | None = None
    tokens_per_second: float | None = None  # real tokens
    flops_per_second: float | None = None
    share_of_gemm_peak: float | None = None
    speedup: Ratio | None = None  # over stock HF in the same dtype
    memory_bytes: int | None = None
    samples: list[float] = field(default_factory=list)


def interleave(
    candidates: Mapping[str, Callable[[int], object]],
    rounds: int,
    *,
    warmup: int = 1,
    inner: int = 1,
    device: str = "cpu",
    progress: Progress = quiet,
    what: str = "timing",
) -> dict[str, list[float]]:
    """Seconds per call of every candidate in every round, in the order A B A B.

    Args:
        candidates: called with the number of the round, so that they can take the round's batch.
        warmup: untimed rounds before, on the round numbers 0, 1, ...
        inner: calls per sample; the sample is their mean.
        device: a CUDA device is waited for before and after each sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup):
        for run in candidates.values():
            run(i % rounds)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name, run in candidates.items():
                limits.synchronize(device)
                begin = time.perf_counter()
                for _ in range(inner):
                    run(i)
                limits.synchronize(device)
                samples[name].append((time.perf_counter() - begin) / inner)
            progress(what, i + 1, rounds)
    finally:
        if collecting:
            gc.enable()
    return samples


def in_turns(
    samplers: Mapping[Name, Callable[[], float]],
    rounds: int,
    seed: int,
    progress: Progress = quiet,
    what: str = "rounds",
) -> dict[Name, list[float]]:
    """A sample of each in every round, each round in another order, for what would leave traces in its neighbours.

    Args:
        samplers: each call gives the seconds of one sample.
        seed: of the orders.
    """
    generator = random.Random(seed)
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    for i in range(rounds):
        for name in generator.sample(list(samplers), len(samplers)):
            samples[name].append(samplers[name]())
        progress(what, i + 1, rounds)
    return samples


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(samples: Sequence[float]) -> Summary:
    """Median, 10% and 90% quantile, total and count."""
    return Summary(
        statistics.median(samples), quantile(samples, 0.1), quantile(samples, 0.9), sum(samples), len(samples)
    )


def ratio(base: Sequence[float], ours: Sequence[float], draws: int = 2000, seed: int = 0) -> Ratio:
    """base / ours, pair by pair; sample i of each was taken in the same round.

    Raises:
        ValueError: the two have not the same number of samples.
    """
    if len(base) != len(ours):
        raise ValueError(f"{len(base)} samples against {len(ours)}: no pairs")
    pairs = [b / o for b, o in zip(base, ours, strict=True)]
    generator = random.Random(seed)
    medians = [statistics.median(generator.choices(pairs, k=len(pairs))) for _ in range(draws)]
    low, high = quantile(medians, 0.025), quantile(medians, 0.975)
    return Ratio(sum(base) / sum(ours), statistics.median(pairs), low, high)


def timed(
    row: SpeedRow,
    samples: Sequence[float],
    *,
    texts: int,
    real_tokens: int,
    flops: int,
    gemm_peak: float | None,
    speedup: Ratio | None = None,
    memory_bytes: int | None = None,
) -> SpeedRow:
    """`row` with its speed from `samples`, in which so many texts, tokens and FLOPs were computed in all."""
    seconds = summarize(samples)
    rate = flops / seconds.total
    return replace(
        row,
        seconds=seconds,
        texts_per_second=texts / seconds.total,
        tokens_per_second=real_tokens / seconds.total,
        flops_per_second=rate,
        share_of_gemm_peak=rate / gemm_peak if gemm_peak else None,
        speedup=speedup,
        memory_bytes=memory_bytes,
        samples=list(samples),
    )


def silenced(row: SpeedRow) -> SpeedRow:
    """An untimed row with parity's words in its note."""
    words = row.parity.words if row.parity else "parity was not checked"
    return replace(row, note=f"no speed: {words}")
