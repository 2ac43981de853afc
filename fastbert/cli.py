"""The command `fastbert`: bench, parity, doctor.

Exit codes: 0 fine, 1 parity failed, 2 usage or missing model, 3 anything else that went wrong.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastbert.checkpoint import MissingModel, resolve

if TYPE_CHECKING:
    from fastbert.bench import Gate
    from fastbert.bench import Progress as ShowProgress
    from fastbert.parity_models import Comparison, ParityReport

PARITY_FAILED, USAGE, BROKEN = 1, 2, 3
PLOT = Path("fastbert-bench.png")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A checkpoint's folder or hub id. Nothing: the demo checkpoint.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Comma-separated, of fp32, bf16, fp16.")]
JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON here; -: to stdout.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or auto (cuda where there is one).")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@contextlib.contextmanager
def in_words(debug: bool, model: str | None = None) -> Iterator[None]:
    """Turns exceptions into words on stderr, which name the model, and an exit code."""
    errors = Console(stderr=True)
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        expected = isinstance(error, (MissingModel, OSError))
        words = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and model and model not in words:
            words = f"{model}: {words}"
        kind = "" if expected else f"{type(error).__name__}: "
        errors.print(f"[red]fastbert:[/red] {escape(kind + words)}", highlight=False, soft_wrap=True)
        if not expected:
            errors.print("(--debug shows where)", highlight=False)
        raise typer.Exit(USAGE if expected else BROKEN) from None


@app.command("bench")
def bench_command(
    model: ModelArgument = None,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", help="A workload's name; may be repeated. [default: docstrings]")
    ] = None,
    dtype: DtypeOption = "fp32,bf16",
    json_file: JsonOption = None,
    plot: Annotated[Path, typer.Option("--plot", metavar="FILE", help="Where the plot goes.")] = PLOT,
    quick: Annotated[bool, typer.Option("--quick", help="Few texts and rounds: a look, not a figure.")] = False,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Time a model against stock HuggingFace, after checking that its numbers agree."""
    names, dtypes, place = _workload_names(workload), _dtypes(dtype), _device(device)
    with in_words(debug, model):
        checkpoint = resolve(model)
        from fastbert import bench_model, report

        _quiet_transformers()

        def gate(name: str) -> Gate:
            return in_short(compare(checkpoint, [name], place).comparisons.values())

        with _progress_bar() as progress:
            result = bench_model.bench_model(
                checkpoint, gate, names=names, dtypes=dtypes, device=place, quick=quick, progress=progress
            )
        out = _console(json_file)
        out.print(report.parity_summary(result))
        for table in report.speed_tables(result):
            out.print(table)
        for line in report.notes(result):
            out.print(escape(line), highlight=False)
        failure = report.plot(result, plot)
        out.print(escape(failure or f"Plot: {plot}"), highlight=False, soft_wrap=True)
        _write_json(json_file, result.to_dict())
    raise typer.Exit(0 if result.passed else PARITY_FAILED)


@app.command("parity")
def parity_command(
    model: ModelArgument = None,
    dtype: DtypeOption = "fp32,bf16",
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Compare every hidden state, the pooled output and the logits with stock HuggingFace."""
    dtypes, place = _dtypes(dtype), _device(device)
    with in_words(debug, model):
        checkpoint = resolve(model)
        from fastbert import report

        _quiet_transformers()
        console = Console(stderr=True)
        with console.status("parity") as status:
            found = compare(checkpoint, dtypes, place, status.update)
        out = _console(json_file)
        out.print(report.parity_table(found))
        for line in report.parity_notes(found):
            out.print(escape(line), highlight=False)
        _write_json(json_file, {"format": 1, **found.as_dict()})
    raise typer.Exit(0 if found.passed else PARITY_FAILED)


@app.command("doctor")
def doctor_command(json_file: JsonOption = None, debug: DebugOption = False) -> None:
    """Say what this machine can run, and why not more."""
    with in_words(debug):
        from fastbert import doctor, report

        found = doctor.examine()
        out = _console(json_file)
        for table in report.doctor_tables(found):
            out.print(table)
        _write_json(json_file, found)


def compare(
    checkpoint: str, dtypes: Sequence[str], device: str, progress: Callable[[str], None] | None = None
) -> ParityReport:
    """The checkpoint judged by the parity rule in these dtypes."""
    from fastbert import parity_models

    return parity_models.run(checkpoint, dtypes, device=device, progress=progress)


def in_short(comparisons: Iterable[Comparison]) -> Gate:
    """One verdict in words: the worst tensor, and why when there was no fast path to compare."""
    from fastbert.bench import Gate

    found = list(comparisons)
    words = []
    for c in found:
        failed = sum(not row.passed for row in c.rows)
        how = (
            f"{failed} of {len(c.rows)} tensors over the bound" if failed else f"{len(c.rows)} tensors within the bound"
        )
        worst = f"; the worst, {c.worst.tensor}, at {c.worst.ratio:.2f} of it" if c.rows else ""
        words += [how + worst] + ([] if c.fast else [f"the fast path did not run: {c.why}"])
    return Gate(all(c.passed for c in found), "; ".join(words))


def _workload_names(given: Sequence[str] | None) -> list[str]:
    from fastbert.workloads import WORKLOADS

    unknown = [name for name in given or () if name not in WORKLOADS]
    if unknown:
        raise typer.BadParameter(f"no workload is called {', '.join(unknown)}; there are: {', '.join(WORKLOADS)}")
    return list(dict.fromkeys(given or ["docstrings"]))


def _dtypes(given: str) -> list[str]:
    from fastbert.dtypes import DTYPES

    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in DTYPES]
    if unknown or not names:
        raise typer.BadParameter(f"unknown dtype {', '.join(unknown) or '(none)'}; there are: {', '.join(DTYPES)}")
    return list(dict.fromkeys(names))


def _device(given: str) -> str:
    import torch

    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = given.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or given == kind):
        raise typer.BadParameter(f"unknown device {given}; there are: auto, cpu, cuda, cuda:1, ...")
    if kind == "cuda" and not (torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()):
        raise typer.BadParameter(f"torch sees no CUDA device {index or 'here'}")
    return given


def _console(json_file: str | None) -> Console:
    """Tables go to stderr when stdout carries the JSON; without a terminal a table takes the width it needs."""
    console = Console(stderr=json_file == "-")
    return console if console.is_terminal else Console(stderr=json_file == "-", width=150)


def _write_json(json_file: str | None, content: dict[str, Any]) -> None:
    if json_file is None:
        return
    text = json.dumps(content, indent=1, default=str)
    if json_file == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def _progress_bar() -> Iterator[ShowProgress]:
    """A bar a stage on stderr; lines of text where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
                if not console.is_terminal:
                    console.print(f"{what} ...", highlight=False)
            bars.update(tasks[what], completed=done)

        yield show


def main() -> None:
    """The console entry."""
    app(prog_name="fastbert")
