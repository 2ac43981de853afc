"""Compares fastbert with its rivals on this CPU, all in one run: python -m benchmarks.cpu_peers --out DIR

Engines: HuggingFace's model as it is and under torch.compile, ONNX Runtime, OpenVINO, CTranslate2 (extra `peers`), each
with its own best settings and this process's threads, and fastbert where it keeps the parity rule. What is not
installed or fails is a row with its reason. Rows are appended to DIR/peers.jsonl as they come; tables, a plot
(DIR/peers.png) and the targets come last. What the columns mean: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.peers import OURS, engines, loads
from benchmarks.peers.measure import Line, Plan, run
from benchmarks.peers.plot import plot
from benchmarks.peers.summary import milliseconds, notes, summary, tables
from benchmarks.peers.targets import targets
from benchmarks.record import jsonl
from fastbert.provenance import load_average, machine

RUNS, BUSY = 3, 0.5  # a load average from which a machine is not quiet
DTYPES, SCALING = ("fp32", "bf16", "int8"), "scaling"
EXAMPLES = """examples:
  python -m benchmarks.cpu_peers --out benchmarks/results/cpu-peers      everything, three runs: some hours
  python -m benchmarks.cpu_peers --out /tmp/peers --quick                a look: one run, three rounds
  python -m benchmarks.cpu_peers --out /tmp/peers --models minilm --only ragged,query --engines fastbert,openvino
  python -m benchmarks.cpu_peers --out /tmp/peers --only scaling --dtypes bf16
  python -m benchmarks.cpu_peers --dry-run                               does everything run: tiny models, no figures

exit codes: 0 done; 1 fastbert broke the parity rule or failed, or with --check a target was missed; 2 usage; 130 Ctrl-C
"""


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_peers", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    out_help = "folder for peers.jsonl and peers.png; --dry-run needs none and takes a temporary one"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    runs_help = f"whole runs; the tables show the medians of all of them; default: {RUNS}, with --quick 1"
    parser.add_argument("--runs", type=int, metavar="N", help=runs_help)
    only = (*loads.WORKLOADS, SCALING)
    parser.add_argument("--only", metavar="WORKLOADS", help=f"comma-separated, of {', '.join(only)}")
    parser.add_argument("--models", metavar="MODELS", help=f"comma-separated, of {', '.join(loads.MODELS)}")
    parser.add_argument("--engines", metavar="ENGINES", help=f"comma-separated, of {', '.join(engines())}")
    parser.add_argument("--dtypes", metavar="DTYPES", help=f"comma-separated, of {', '.join(DTYPES)}")
    parser.add_argument("--quick", action="store_true", help="few rounds, one run: a look, no figures")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, one run: does every engine run")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target was missed or not measured")
    return parser


def chosen(parser: argparse.ArgumentParser, given: str | None, known: Sequence[str], what: str) -> list[str]:
    """The names that were given, in the order in which they are known."""
    names = given.split(",") if given else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no {what} is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [name for name in known if name in names]


def planned(parser: argparse.ArgumentParser, given: argparse.Namespace, folder: Path) -> Plan:
    models = loads.DRY_MODELS if given.dry_run else loads.MODELS
    rivals = engines(given.dry_run)
    only = chosen(parser, given.only, (*loads.WORKLOADS, SCALING), "workload")
    return Plan(
        models={name: models[name] for name in chosen(parser, given.models, list(models), "model")},
        workloads=[name for name in only if name != SCALING],
        scaling=SCALING in only,
        engines={name: rivals[name] for name in chosen(parser, given.engines, list(rivals), "engine")},
        dtypes=chosen(parser, given.dtypes, DTYPES, "dtype"),
        folder=folder,
        quick=given.quick,
        dry_run=given.dry_run,
    )


def record(plan: Plan, runs: int, file: Path, console: Console) -> list[Line]:
    """All rows of all runs, each appended to the file as it came."""
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=None)
        for number in range(1, runs + 1):
            for row in run(plan, number, lambda what, i, n: bars.update(bar, description=what, completed=i, total=n)):
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                line = {"run": number, **row, "date": now, "load_average": load_average()}
                jsonl.append(file, line)
                found.append(json.loads(json.dumps(jsonl.finite(line), default=str)))
                if words := said(line):
                    console.print(escape(f"run {number}/{runs}  {words}"), highlight=False)
                    console.file.flush()  # also where it is a pipe
    return found


def said(line: Line) -> str:
    """A row while the command runs."""
    if line["part"] == "engines":
        what = f"{line['model']} {line['workload']}: {line['title']} {line['dtype']}"
        return f"{what}: {line['reason'] or milliseconds(line['seconds']['median']) + ' ms'}"
    if line["part"] == SCALING:
        what = f"{line['model']} {line['workload']} {line['dtype']}: cost of {line['what']}"
        return f"{what}: {line['reason'] or '{median:.3f} [{low:.3f}-{high:.3f}]'.format(**line['ratio'])}"
    return ""


def show(found: Sequence[Line], file: Path, console: Console) -> bool:
    """Tables, plot and targets, which are appended too; whether every target was met."""
    rows = summary(found, OURS)
    judged = targets(rows, [line for line in found if line["part"] == SCALING], OURS)
    for row in rows:
        jsonl.append(file, {"part": "summary", **dataclasses.asdict(row)})
    for table in tables(rows, OURS):
        console.print(table)
    for words in notes(rows):
        console.print(escape(words), highlight=False)
    here = machine()
    look = " (a look, no figures)" if any(line.get("quick") or line.get("dry_run") for line in found) else ""
    title = f"{here['cpu']}, {here['threads']} threads, {', '.join(here['isa'])}{look}"
    console.print(escape(plot(rows, file.with_suffix(".png"), title, OURS) or str(file.with_suffix(".png"))))
    for target in judged:
        jsonl.append(file, {"part": "target", **dataclasses.asdict(target), "met": target.met, "words": target.words})
        console.print(escape(target.words), style="green" if target.met else "red", highlight=False)
    met = sum(target.met for target in judged)
    console.print(f"targets{look}: {met} of {len(judged)} met; {file}", highlight=False)
    return met == len(judged)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = parser_of()
    given = parser.parse_args(arguments)
    if given.out is None and not given.dry_run:
        parser.error("--out DIR is needed: where the record goes")
    if given.runs is not None and given.runs < 1:
        parser.error("--runs must be 1 or more")
    runs = given.runs or (1 if given.quick or given.dry_run else RUNS)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="cpu_peers-") as folder:
        plan = planned(parser, given, Path(folder))
        for name, rival in plan.engines.items():
            if reason := rival.available():
                console.print(escape(f"{name}: {reason}"), highlight=False)
        load = load_average()
        if load and load[0] > BUSY and not given.dry_run:
            console.print(f"this machine is busy (load average {load[0]}): its figures will be noisy", style="yellow")
        out = given.out or Path(tempfile.mkdtemp(prefix="cpu_peers-"))
        out.mkdir(parents=True, exist_ok=True)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            found = record(plan, runs, out / "peers.jsonl", console)
        except KeyboardInterrupt:
            console.print(f"stopped; what is known stands in {out / 'peers.jsonl'}")
            return 130
        met = show(found, out / "peers.jsonl", console)
    broken = any(line.get("engine") == OURS and line["reason"] for line in found if line["part"] == "engines")
    return 1 if broken or (given.check and not met) else 0


if __name__ == "__main__":
    sys.exit(main())
