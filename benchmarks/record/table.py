"""The short table of a record, made of its rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.record.setting import Line
from fastbert.proven import OWN


def show(rows: Sequence[Line], console: Console) -> None:
    """Parts, what failed, ops and models."""
    for table in (parts(rows), failed(rows), ops(rows), shares(rows), models(rows)):
        if table.row_count:
            console.print(table)


def made(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def parts(rows: Sequence[Line]) -> Table:
    """Each part: how it ended."""
    table = made("Parts", ("part", "rows", "ended"), ("s",))
    counts = Counter(row["part"] for row in rows if "wall_seconds" not in row)
    for row in rows:
        if "wall_seconds" in row:
            words = "done" if row["done"] else row.get("error") or row.get("cut", "")
            table.add_row(row["part"], str(counts[row["part"]]), escape(words), f"{row['wall_seconds']:.1f}")
    return table


def failed(rows: Sequence[Line]) -> Table:
    """What broke a rule, or raised."""
    table = made("Failed", ("part", "what", "words"), ())
    for row in rows:
        if row.get("passed") is False or ("error" in row and "wall_seconds" not in row):
            what = " ".join(str(row[key]) for key in ("op", "case", "dtype", "backend", "tool") if key in row)
            words = str(row.get("words") or row.get("error") or row.get("why") or row.get("said", ""))
            table.add_row(row["part"], what, escape(words[:160]))
    return table


def ops(rows: Sequence[Line]) -> Table:
    """Ours beside stock and the best of PyTorch's own, in microseconds, at the first case that was timed."""
    timed = [row for row in rows if row["part"] == "ops" and "seconds" in row and "variant" not in row]
    where = next(((row["case"], row["dtype"]) for row in timed), ("", ""))
    title = f"Ops at {' in '.join(where)}, µs"
    table = made(title, ("op",), ("ours", "% of limit", "limited by", "stock", "best other", ""))
    here = [row for row in timed if (row["case"], row["dtype"]) == where]
    for op in dict.fromkeys(row["op"] for row in here):
        mine = [row for row in here if row["op"] == op]
        ours = min((row for row in mine if row["backend"] in OWN), key=median, default=None)
        stock = next((row for row in mine if row["backend"] == "stock"), None)
        other = min((r for r in mine if r["backend"] not in {*OWN, "stock"}), key=median, default=None)
        numbers = [f"{median(row) * 1e6:,.1f}" if row else "-" for row in (ours, stock, other)]
        share = f"{ours['share_of_limit']:.0%}" if ours else "-"
        table.add_row(op, numbers[0], share, mine[0]["limited_by"], *numbers[1:], other["backend"] if other else "")
    return table


def shares(rows: Sequence[Line]) -> Table:
    """Ours at every case: % of the limit, and how many times as fast as the best other one."""
    timed = [row for row in rows if row["part"] == "ops" and "seconds" in row and "variant" not in row]
    cases = list(dict.fromkeys((row["case"], row["dtype"]) for row in timed))
    table = made("Ops: % of limit, times as fast as the best of PyTorch's own", ("op",), [" ".join(c) for c in cases])
    for op in dict.fromkeys(row["op"] for row in timed):
        cells = []
        for case in cases:
            mine = [row for row in timed if (row["op"], row["case"], row["dtype"]) == (op, *case)]
            ours = min((row for row in mine if row["backend"] in OWN), key=median, default=None)
            other = min((row for row in mine if row["backend"] not in OWN), key=median, default=None)
            both = ours and other and f"{ours['share_of_limit']:.0%} x{median(other) / median(ours):.2f}"
            cells.append(both or "-")
        if set(cells) != {"-"}:
            table.add_row(op, *cells)
    return table


def models(rows: Sequence[Line]) -> Table:
    """Milliseconds of each engine."""
    timed = [row for row in rows if row["part"] in ("models", "baselines") and "seconds" in row]
    engines = list(dict.fromkeys(row["engine"] for row in timed))
    table = made("Models, ms", ("case", "dtype", "mode"), (*engines, "ours, % of limit"))
    for key in dict.fromkeys((row["case"], row["dtype"], row["mode"]) for row in timed):
        mine = {row["engine"]: row for row in timed if (row["case"], row["dtype"], row["mode"]) == key}
        cells = [f"{median(mine[engine]) * 1e3:,.2f}" if engine in mine else "-" for engine in engines]
        share = f"{mine['fastbert']['share_of_limit']:.0%}" if "fastbert" in mine else "-"
        table.add_row(*key, *cells, share)
    return table


def median(row: Line) -> float:
    seconds: float = row["seconds"]["median"]
    return seconds
