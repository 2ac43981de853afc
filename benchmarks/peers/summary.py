"""The medians of all runs, made of a record's rows alone, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.record.table import made
from fastbert import bench

Line = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One engine in one precision on one workload of one model, over all runs.

    Args:
        seconds: the median of the runs' medians; `fastest` and `slowest` are the least and the largest of these.
        relative_error: of the last hidden state at real tokens, against HuggingFace's model in float64.
        share_of_peak: FLOP/s on real tokens over the best product of the same run; the median of the runs.
        times_best_peer: how many times as fast as `best_peer`, the fastest engine that is not fastbert in the same
            precision; in each run the median over pairs of the same round, then the median of the runs.
        reason: why there are no figures; note: what is to be said beside them.
    """

    model: str
    workload: str
    engine: str
    title: str
    dtype: str
    runs: int = 0
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    tokens_per_second: float | None = None  # real ones
    relative_error: float | None = None
    share_of_peak: float | None = None
    best_peer: str = ""
    times_best_peer: float | None = None
    reason: str = ""
    note: str = ""


def summary(lines: Sequence[Line], ours: str) -> list[Row]:
    """A row for each engine, in the order of the record."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line["part"] == "engines":
            key = line["model"], line["workload"], line["engine"], line["dtype"]
            found.setdefault(key, []).append(line)
    peaks = peaks_of(lines)
    return [row(key, same, best_peer(key, found, ours), peaks) for key, same in found.items()]


def row(key: tuple[str, ...], same: Sequence[Line], peer: Sequence[Line], peaks: dict[tuple[int, str], float]) -> Row:
    """same: the engine's line of each run; peer: the best peer's."""
    model, workload, engine, dtype = key
    timed = [line for line in same if not line["reason"]]
    failed = [line["reason"] for line in same if line["reason"]]
    base = {"model": model, "workload": workload, "engine": engine, "title": same[0]["title"], "dtype": dtype}
    if not timed:
        return Row(**base, reason=failed[0], best_peer=peer[0]["title"] if peer else "")
    medians = [line["seconds"]["median"] for line in timed]
    seconds = statistics.median(medians)
    shares = [line["flops_per_second"] / peaks[line["run"], dtype] for line in timed if (line["run"], dtype) in peaks]
    theirs = {line["run"]: line for line in peer}
    pairs = [(theirs[line["run"]], line) for line in timed if line["run"] in theirs]
    times = [bench.ratio(p["samples"], line["samples"], draws=1).median for p, line in pairs]
    return Row(
        **base,
        runs=len(timed),
        seconds=seconds,
        fastest=min(medians),
        slowest=max(medians),
        tokens_per_second=timed[0]["real_tokens"] / seconds,
        relative_error=max(line["relative_error"] for line in timed),
        share_of_peak=statistics.median(shares) if shares else None,
        best_peer=peer[0]["title"] if peer else "",
        times_best_peer=statistics.median(t for t in times if t is not None) if times else None,
        note=f"ran in {len(timed)} of {len(same)} runs: {failed[0]}" if failed else "",
    )


def best_peer(key: tuple[str, ...], found: dict[tuple[str, ...], list[Line]], ours: str) -> list[Line]:
    """The lines of the peer whose median of medians is least, in the same precision; none: []."""
    peers = []
    for other, lines in found.items():
        timed = [line for line in lines if not line["reason"]]
        if timed and other[:2] == key[:2] and other[3] == key[3] and other[2] != ours:
            peers.append(timed)
    return min(peers, key=lambda timed: statistics.median(t["seconds"]["median"] for t in timed), default=[])


def peaks_of(lines: Sequence[Line]) -> dict[tuple[int, str], float]:
    """(run, dtype) → the best rate that was found in that run, before the models or behind them."""
    found: dict[tuple[int, str], float] = {}
    for line in lines:
        if line["part"] == "peaks":
            for dtype, peak in line["peaks"].items():
                key = line["run"], dtype
                if "flops_per_second" in peak:
                    found[key] = max(found.get(key, 0.0), peak["flops_per_second"])
    return found


def tables(rows: Sequence[Row], ours: str) -> Iterator[Table]:
    """One for each model and workload."""
    for model, workload in dict.fromkeys((row.model, row.workload) for row in rows):
        same = [row for row in rows if (row.model, row.workload) == (model, workload)]
        columns = ("ms", "runs' spread", "tokens/s", "rel. error", "of peak", "x best peer")
        table = made(f"{model}, {workload}", ("engine", "dtype"), columns)
        for row in sorted(same, key=lambda row: list(dict.fromkeys(r.dtype for r in same)).index(row.dtype)):
            table.add_row(row.title, row.dtype, *figures(row), style="bold" if row.engine == ours else None)
        yield table


def figures(row: Row) -> list[str]:
    if row.seconds is None or row.fastest is None or row.slowest is None:
        return ["-"] * 6
    return [
        milliseconds(row.seconds),
        f"{milliseconds(row.fastest)}-{milliseconds(row.slowest)}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.relative_error:.1e}",
        "-" if row.share_of_peak is None else f"{row.share_of_peak:.0%}",
        "-" if row.times_best_peer is None else f"{row.times_best_peer:.2f}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Why engines have no figures: each reason once, with the precisions and, if not all, the places it holds for."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if words := row.reason or row.note:
            found.setdefault((row.title, words), []).append(row)
    everywhere = len({(row.model, row.workload) for row in rows})
    said = []
    for (title, words), same in found.items():
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in same))
        places = list(dict.fromkeys(f"{row.model} {row.workload}" for row in same))
        where = "" if len(places) == everywhere else f" ({', '.join(places)})"
        said.append(f"{title} {dtypes}{where}: {words}")
    return said
