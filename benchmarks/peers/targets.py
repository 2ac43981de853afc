"""What fastbert must reach beside its rivals, and whether the medians of all runs do."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.summary import Row

SPEED = {"dense": 1.0, "ragged": 1.8, "query": 1.2}  # times the best peer of the same precision, at least
SHARE = {"fp32": 0.90, "bf16": 0.85, "int8": 0.60}  # of the peak of products, at least
SHARED = ("dense", "ragged")  # of BERT-base
SCALING = {"padding doubled": 1.03, "10 x the sequences": 10.3}  # times the cost, at most


@dataclass(frozen=True)
class Target:
    """figure: None: it could not be measured, `why` says in words."""

    what: str
    wanted: float
    at_most: bool
    figure: float | None
    why: str = ""

    @property
    def met(self) -> bool:
        return self.figure is not None and (self.figure <= self.wanted if self.at_most else self.figure >= self.wanted)

    @property
    def words(self) -> str:
        bound = f"{'<=' if self.at_most else '>='} {self.wanted:g}"
        if self.figure is None:
            return f"missed: {self.what} {bound}: not measured: {self.why}"
        return f"{'met' if self.met else 'missed'}: {self.what} {bound}: {self.figure:.3f}"


def targets(rows: Sequence[Row], scaling: Sequence[dict[str, Any]], ours: str) -> list[Target]:
    """Every target that speaks of something that was asked for.

    Args:
        rows: the summary, of all engines.
        scaling: the rows of the scaling checks of all runs.
    """
    mine = [row for row in rows if row.engine == ours]
    return [*speeds(mine), *shares(mine), *scalings(scaling)]


def speeds(mine: Sequence[Row]) -> Iterator[Target]:
    for row in mine:
        if row.workload in SPEED:
            what = f"{row.model} {row.workload} {row.dtype}: times the best peer ({row.best_peer or 'none'})"
            why = row.reason or "no peer of this precision ran"
            yield Target(what, SPEED[row.workload], False, row.times_best_peer, why)


def shares(mine: Sequence[Row]) -> Iterator[Target]:
    for row in mine:
        if row.model == "bert-base" and row.workload in SHARED:
            what = f"{row.model} {row.workload} {row.dtype}: share of the peak of products"
            yield Target(what, SHARE[row.dtype], False, row.share_of_peak, row.reason or "no peak was measured")


def scalings(rows: Sequence[dict[str, Any]]) -> Iterator[Target]:
    """The median of the runs' medians; the widest of their intervals stands beside it."""
    for key in dict.fromkeys((row["model"], row["dtype"], row["what"]) for row in rows):
        same = [row for row in rows if (row["model"], row["dtype"], row["what"]) == key]
        ratios = [row["ratio"] for row in same if not row["reason"]]
        what = f"{key[0]} ragged {key[1]}: cost of {key[2]}"
        if not ratios:
            yield Target(what, SCALING[key[2]], True, None, same[0]["reason"])
            continue
        low, high = min(ratio["low"] for ratio in ratios), max(ratio["high"] for ratio in ratios)
        what += f" (95% interval {low:.3f}-{high:.3f})"
        yield Target(what, SCALING[key[2]], True, statistics.median(ratio["median"] for ratio in ratios))
