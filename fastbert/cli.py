"""The command `fastbert`: bench, parity, doctor. Nothing here imports torch before a command runs: --help is quick."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastbert
from fastbert.checkpoint import CheckpointError, inspect, out_of_memory, resolve

if TYPE_CHECKING:
    from fastbert.bench import Gate
    from fastbert.bench import Progress as ShowProgress
    from fastbert.parity_models import Comparison, ParityReport

FAILED, USAGE, BROKEN, INTERRUPTED, NO_READER = 1, 2, 3, 130, 141
PLOT = Path("fastbert-bench.png")
DTYPE_NAMES = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


def _epilog(codes: str, *examples: str) -> str:
    """What stands at the end of a --help; an empty line starts a new one there."""
    return "\n\n".join(["Examples:", *(f"  {escape(line)}" for line in examples), f"Exit codes: {codes}, 130 Ctrl-C."])


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_epilog(
        "0 fine, 1 parity failed or a part is broken, 2 usage or checkpoint, 3 anything else",
        "fastbert doctor                  # what this machine can run",
        "fastbert parity                  # the demo checkpoint's numbers",
        "fastbert bench --quick           # a look at its speed",
    ),
)


def _complete_workload(incomplete: str) -> list[str]:
    from fastbert.workloads import WORKLOADS

    return [name for name in WORKLOADS if name.startswith(incomplete)]


def _complete_dtype(incomplete: str) -> list[str]:
    """The names that may follow what is typed: `bf16,` may become `bf16,fp32`."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{n}" for n in DTYPE_NAMES if n.startswith(last) and n not in before.split(",")]


def _complete_device(incomplete: str) -> list[str]:
    return [name for name in DEVICES if name.startswith(incomplete)]


ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A checkpoint's folder or hub id. Nothing: the demo checkpoint.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help=f"Comma-separated, of {', '.join(DTYPE_NAMES)}.", autocompletion=_complete_dtype)
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Write JSON here; -: to stdout, and the tables to stderr."),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda or auto (cuda where there is one).", autocompletion=_complete_device),
]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Take weights that only come as a pickle; tensors alone are read.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastbert {fastbert.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """BERT-family encoders faster, with HuggingFace's numbers: check a checkpoint, time it, look at the machine."""


@app.command(
    "bench",
    epilog=_epilog(
        "0 fine, 1 parity failed in a dtype, 2 usage or checkpoint, 3 anything else",
        "fastbert bench --quick",
        "fastbert bench ./my-bert --dtype fp32 --json bench.json --plot bench.png",
        "fastbert bench ./my-bert --workload query-1x16 --quick --quiet",
    ),
)
def bench_command(
    model: ModelArgument = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            help="A workload's name; may be repeated. An unknown one lists them.",
            show_default="docstrings",
            autocompletion=_complete_workload,
        ),
    ] = None,
    dtype: DtypeOption = "fp32,bf16",
    json_file: JsonOption = None,
    plot: Annotated[Path, typer.Option("--plot", metavar="FILE", help="Where the plot goes.")] = PLOT,
    quick: Annotated[bool, typer.Option("--quick", help="Few texts and rounds: a look, not a figure.")] = False,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a model against stock HuggingFace, after checking that its numbers agree."""
    with in_words(debug):
        names, dtypes = _workload_names(workload), _dtypes(dtype)
        _check_writable("--json", json_file)
        _check_writable("--plot", None if plot == PLOT else plot)
        checkpoint, place = _prepare(model, allow_pickle, device, dtypes, quiet)
        from fastbert import bench_model, report

        with _progress_bar(quiet) as progress:

            def gate(name: str) -> Gate:
                return in_short(compare(checkpoint, [name], place, progress).comparisons.values())

            result = bench_model.bench_model(
                checkpoint, gate, names=names, dtypes=dtypes, device=place, quick=quick, progress=progress
            )
        out = _console(json_file)
        for table in [report.parity_summary(result), *report.speed_tables(result)]:
            _show(out, table)
        for line in report.notes(result):
            out.print(escape(line), highlight=False)
        failure = report.plot(result, plot)
        out.print(escape(failure or f"Plot: {plot}"), highlight=False, soft_wrap=True)
        _write_json(json_file, result.to_dict())
        raise typer.Exit(0 if result.passed else FAILED)


@app.command(
    "parity",
    epilog=_epilog(
        "0 every tensor passed, 1 one did not or the fast path did not run, 2 usage or checkpoint, 3 anything else",
        "fastbert parity",
        "fastbert parity ./my-bert --dtype fp32,bf16,fp16",
        "fastbert parity ./my-bert --dtype fp32 --quiet --json - > parity.json",
    ),
)
def parity_command(
    model: ModelArgument = None,
    dtype: DtypeOption = "fp32,bf16",
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare every hidden state, the pooled output and the logits with stock HuggingFace."""
    with in_words(debug):
        dtypes = _dtypes(dtype)
        _check_writable("--json", json_file)
        checkpoint, place = _prepare(model, allow_pickle, device, dtypes, quiet)
        from fastbert import report
        from fastbert.provenance import provenance

        with _progress_bar(quiet) as progress:
            found = compare(checkpoint, dtypes, place, progress)
        out = _console(json_file)
        _show(out, report.parity_table(found))
        for line in report.parity_notes(found):
            out.print(escape(line), highlight=False)
        _write_json(json_file, {"format": 1, **found.as_dict(), "device": place, "provenance": provenance()})
        raise typer.Exit(0 if found.passed else FAILED)


@app.command(
    "doctor",
    epilog=_epilog(
        "0 fine, 1 a part is broken or a kernel failed its check, 2 usage, 3 anything else",
        "fastbert doctor",
        "fastbert doctor --json -",
    ),
)
def doctor_command(json_file: JsonOption = None, debug: DebugOption = False) -> None:
    """Say what this machine can run, and why not more."""
    with in_words(debug):
        _check_writable("--json", json_file)
        _needs("torch", "Tensor")
        from fastbert import doctor, report

        found = doctor.examine()
        out = _console(json_file)
        for table in report.doctor_tables(found):
            _show(out, table)
        _write_json(json_file, found)
        raise typer.Exit(FAILED if _is_broken(found) else 0)


@contextlib.contextmanager
def in_words(debug: bool) -> Iterator[None]:
    """Turns exceptions into words on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        _complain("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # `fastbert doctor | head -1`
        with contextlib.suppress(OSError, ValueError):  # or Python complains when it flushes stdout at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(NO_READER) from None
    except Exception as error:  # no traceback without --debug
        if debug:
            traceback.print_exc()
        words = " ".join(str(error).split())
        if isinstance(error, (CheckpointError, _BrokenPackage)):
            _complain(words)
        elif out_of_memory(error):
            _complain(f"out of memory: one --dtype at a time or a smaller workload needs less ({words})")
        else:
            _complain(f"{type(error).__name__}: {words}")
            if not debug:
                _complain("--debug shows where")
        raise typer.Exit(USAGE if isinstance(error, CheckpointError) else BROKEN) from None


def _complain(words: str) -> None:
    _Console(stderr=True).print(f"[red]fastbert:[/red] {escape(words)}", highlight=False, soft_wrap=True)


def _prepare(model: str | None, allow_pickle: bool, device: str, dtypes: Sequence[str], quiet: bool) -> tuple[str, str]:
    """(checkpoint, device), both looked at; what cannot be used is refused before torch is waited for."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or transformers asks the hub to convert a pickle
    checkpoint = resolve(model)
    inspect(checkpoint, allow_pickle)
    _needs("torch", "Tensor")
    place = _device(device, dtypes)
    _needs("transformers", "BertModel")  # AutoModel would not load the code that models are made of
    _needs("fastbert", "explain")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return checkpoint, place


class _BrokenPackage(Exception):
    """A package that is needed cannot be imported."""


def _needs(package: str, name: str) -> None:
    """Imports a package and a name that its lazy import would load later."""
    try:
        getattr(importlib.import_module(package), name)
    except Exception as error:  # whatever a broken package raises at its import
        raise _BrokenPackage(f"{package} cannot be imported: {type(error).__name__}: {error}. Reinstall it") from error


def _is_broken(found: Any) -> bool:
    """Whether a part of what the doctor found raised an error, or a kernel failed its self-check."""
    if isinstance(found, dict):
        return "error" in found or found.get("state") == "failed" or any(map(_is_broken, found.values()))
    return isinstance(found, list) and any(map(_is_broken, found))


def compare(checkpoint: str, dtypes: Sequence[str], device: str, progress: ShowProgress) -> ParityReport:
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
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in DTYPE_NAMES]
    if unknown or not names:
        raise typer.BadParameter(f"unknown dtype {', '.join(unknown) or '(none)'}; there are: {', '.join(DTYPE_NAMES)}")
    return list(dict.fromkeys(names))


def _device(given: str, dtypes: Sequence[str]) -> str:
    """The device by torch's name, after a product of two numbers in each dtype there."""
    import torch

    from fastbert.dtypes import DTYPES

    place = ("cuda" if torch.cuda.is_available() else "cpu") if given == "auto" else given
    kind, _, index = place.partition(":")
    if kind not in DEVICES[1:] or not (index.isdecimal() or place == kind):
        raise typer.BadParameter(f"unknown device {given}; there are: {', '.join(DEVICES)}, cuda:1, ...")
    if kind == "cpu" and index:
        raise typer.BadParameter(f"unknown device {given}: the CPU is cpu")
    if kind == "cuda" and not (torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()):
        raise typer.BadParameter(f"torch sees no CUDA device {index or 'here'}")
    for name in dtypes:
        try:
            one = torch.ones(1, 1, dtype=DTYPES[name], device=place)
            (one @ one).item()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise typer.BadParameter(f"torch does not compute in {name} on {place}: {error}") from None
    return place


def _check_writable(option: str, file: str | Path | None) -> None:
    """Refuses a file that cannot be written before the long work begins."""
    if file is None or file == "-":
        return
    path = Path(file)
    if path.is_dir():
        raise typer.BadParameter(f"{option}: {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{option}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{option}: {path} cannot be written")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(json_file: str | None) -> Console:
    """Tables go to stderr when stdout carries the JSON; without a terminal a table takes the width it needs."""
    console = _Console(stderr=json_file == "-")
    return console if console.is_terminal else _Console(stderr=json_file == "-", width=150)


def _show(out: Console, table: Table) -> None:
    """Prints a table; one that the terminal is too narrow for without its lines, or as text: no figure is cut."""
    for column in table.columns:
        column.overflow = "fold"
    unbounded = _Console(width=10_000)
    if unbounded.measure(table).minimum > out.width:
        table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    if unbounded.measure(table).minimum <= out.width:
        out.print(table)
        return
    out.print(f"[bold]{table.title}[/bold]")
    headers = [f"{column.header} " if table.show_header else "" for column in table.columns]
    for first, *rest in zip(*(column.cells for column in table.columns), strict=True):
        figures = "; ".join(f"{header}{cell}".strip() for header, cell in zip(headers[1:], rest, strict=True))
        out.print(f"{first}: {figures}".replace("\n", ", "), highlight=False)


def _write_json(json_file: str | None, content: dict[str, Any]) -> None:
    if json_file is None:
        return
    text = json.dumps(_finite(content), indent=1, default=str, allow_nan=False) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(json_file).write_text(text, encoding="utf-8")


def _finite(content: Any) -> Any:
    """The same with null for what JSON has no number for: NaN and infinities."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator[ShowProgress]:
    """A bar a stage on stderr; one line of text a stage where that is no terminal; nothing if `quiet`."""
    console = _Console(stderr=True, quiet=quiet)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=of)
                if not console.is_terminal:
                    console.print(escape(f"{what} ..."), highlight=False, soft_wrap=True)
            bars.update(tasks[what], completed=done)

        yield show


def main() -> None:
    """The console entry."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × shows ? for it
    app(prog_name="fastbert")
