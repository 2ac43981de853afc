"""Writes what a record proves into the package: python -m benchmarks.proven benchmarks/results/NAME/record.jsonl ...

A kernel is proven in a dtype on a card if it kept the parity rule at every case of a record of `benchmarks.gpu_record`
that was made of its present sources. What fastbert/proven.json held of the same kernels on the same card is replaced,
and what it held of sources that have changed since is dropped. Then prints the README's table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastbert import proven
from fastbert.ops import ALL
from fastbert.proven import Record

ROOT = Path(__file__).resolve().parent.parent
OLDEST_OF_TRITON = 80  # `OLDEST` of kernels/cards.py, which cannot be imported without Triton


def proofs(rows: Sequence[dict[str, Any]], measured: str) -> list[Record]:
    """What the rows of a record prove of each kernel of ours; no dtypes: nothing.

    Raises:
        ValueError: the rows are of a dry run, or lack a part that is needed, or it raised.
    """
    heads = [row for row in rows if row["part"] == "provenance" and "card" in row]
    parity = [row for row in rows if row["part"] == "parity" and "passed" in row and row["backend"] in proven.OWN]
    done = {row["part"] for row in rows if row.get("done")}
    if len(heads) != 1 or not {"provenance", "parity"} <= done:
        raise ValueError(f"{measured}: needs one whole run of the parts provenance and parity")
    (head,) = heads
    if head["dry_run"]:
        raise ValueError(f"{measured} is of a dry run, which proves nothing")
    found = []
    for kernel, backend in dict.fromkeys((row["op"], row["backend"]) for row in parity):
        sources = head["sources"][f"{kernel} {backend}"]
        mine = [row for row in parity if (row["op"], row["backend"]) == (kernel, backend)]
        failed = {row["input"] for row in mine if not row["passed"]}
        dtypes = [kind for kind in dict.fromkeys(row["input"] for row in mine) if kind not in failed]
        if sources == proven.digest(kernel, backend):
            git = head["git"] or {"commit": "unknown", "dirty": False}
            commit = f"{git['commit']}{' and changes' if git['dirty'] else ''}"
            found.append(
                Record(
                    kernel=kernel, backend=backend, card=head["card"], dtypes=dtypes, sources=sources,
                    commit=commit, date=head["date"], measured=measured,
                )
            )  # fmt: skip
    return found


def merged(old: Iterable[Record], new: Sequence[Record]) -> list[Record]:
    """The old records that are neither replaced nor stale, and those of the new ones that prove something."""
    replaced = {(r["kernel"], r["backend"], r["card"]) for r in new}
    kept = [r for r in current(old) if (r["kernel"], r["backend"], r["card"]) not in replaced]
    return sorted([*kept, *(r for r in new if r["dtypes"])], key=lambda r: (r["kernel"], r["backend"], r["card"]))


def current(records: Iterable[Record]) -> list[Record]:
    """The records of the sources as they stand in this checkout, whatever was built of them here."""
    return [r for r in records if r["sources"] == proven.digest(r["kernel"], r["backend"])]


def card_table() -> str:
    """The README's table, in markdown: per card which of our kernels are proven there, and which compile only.

    An op stands for its backward too, where neither is proven.
    """
    native = {op.name: [b for b in op.backends if b in proven.OWN] for op in ALL}
    on_cpu = [op for op, backends in native.items() if "cpu" in backends]
    on_gpu = [f"{op} ({b})" for b in ("triton", "cuda") for op, backends in native.items() if b in backends]
    records = current(proven.records())
    cards = {"CPU": [r for r in records if r["backend"] == "cpu"]}
    for arch in cuda_archs():
        cards[arch] = [r for r in records if r["backend"] != "cpu" and f"({arch})" in r["card"]]
    alike: dict[str, list[str]] = {}  # cards of which the same is known stand in one line
    for card, found in cards.items():
        names = [r["kernel"] if card == "CPU" else f"{r['kernel']} ({r['backend']})" for r in found]
        where = [f"{name}: {', '.join(r['dtypes'])}; {r['card']}" for name, r in zip(names, found, strict=True)]
        compiled = on_cpu if card == "CPU" else on_gpu
        if card != "CPU" and int(card.removeprefix("sm_")) < OLDEST_OF_TRITON:  # which is bfloat16's mma.sync too
            compiled = [k for k in on_gpu if "(triton)" not in k and not k.startswith("attention")]
        rest = [kernel for kernel in compiled if kernel not in names]
        rest = [k for k in rest if "_backward" not in k or k.replace("_backward", "") not in rest]  # named by its op
        alike.setdefault(f"{'<br>'.join(where) or 'nothing'} | {', '.join(rest) or 'nothing'}", []).append(card)
    lines = [f"| {', '.join(cards)} | {known} |" for known, cards in alike.items()]
    return "\n".join(["| Card | proven there | compiles only |", "|---|---|---|", *lines])


def cuda_archs() -> list[str]:
    """The cards that setup.py compiles for: "sm_75", ..."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [f"sm_{arch.rstrip('a')}" for arch in module.CUDA_ARCHS]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proven", description=__doc__)
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD", help="record.jsonl of benchmarks.gpu_record")
    given = parser.parse_args(arguments)
    found = list(proven.records())
    try:
        for path in given.records:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            place = path.resolve()
            measured = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
            found = merged(found, proofs(rows, measured.as_posix()))
    except (OSError, ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        return 1
    proven.RECORDS.write_text(json.dumps({"proven": merged(found, [])}, indent=1) + "\n", encoding="utf-8")
    proven.records.cache_clear()
    print(card_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
