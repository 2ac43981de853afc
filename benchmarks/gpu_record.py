"""Records what a device does: python -m benchmarks.gpu_record --out DIR

Parts run one after another, most valuable first; each row is appended to DIR/record.jsonl as soon as it is known. A
part that raises leaves its traceback there, one whose time is over says so, and the next part runs. A table of it comes
last. Exit code 1: some part raised. The parts are the modules of benchmarks/record/; what rows hold:
benchmarks/results/README.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.record import (
    baselines,
    card,
    ceilings,
    jsonl,
    load,
    models,
    op_times,
    origin,
    parity,
    sanitizer,
    sweep,
    table,
)
from benchmarks.record.setting import Line, Setting, in_words
from fastbert import ops

ROOT = Path(__file__).parents[1]
MINUTES = 8.3  # with the start of Python under 9
STARTING = 15.0  # seconds that another process takes for its imports
GRACE = 20.0  # seconds behind the end of all, in which a row may still be finished


@dataclass(frozen=True)
class Part:
    """What makes the rows, and the share of the whole time after which the part is cut."""

    run: Callable[[Setting], Iterator[Line]]
    share: float


PARTS: dict[str, Part] = {
    "provenance": Part(origin.run, 0.05),
    "ceilings": Part(ceilings.run, 0.10),
    "load": Part(load.run, 0.25),
    "parity": Part(parity.run, 0.30),
    "ops": Part(op_times.run, 0.20),
    "models": Part(models.run, 0.30),
    "sanitizer": Part(sanitizer.run, 0.15),
    "sweep": Part(sweep.run, 0.10),
}
BASELINES: dict[str, Part] = {"provenance": PARTS["provenance"], "baselines": Part(baselines.run, 1.0)}


@dataclass
class Recorder:
    """Runs parts and appends their rows to a file.

    Args:
        seconds: for all parts together; infinite: no part is cut.
    """

    setting: Setting
    file: Path
    seconds: float

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.begin = self.file.stat().st_size if self.file.exists() else 0

    def append(self, line: Line) -> None:
        """Writes a row; it is in the file when this returns."""
        jsonl.append(self.file, line)

    def rows(self) -> list[Line]:
        """What this run wrote, and a process that it handed over to."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            return [json.loads(line) for line in file]

    def run(self, parts: dict[str, Part]) -> list[str]:
        """Runs the parts in order; returns the names of those that raised."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        broken, names = [], list(parts)
        for i, name in enumerate(names):
            print(f"{name} ...", flush=True)
            if not self.run_part(name, parts[name]):
                broken.append(name)
                if self.setting.is_lost:
                    return [*broken, *self.hand_over(names[i:])]
        return broken

    def run_part(self, name: str, part: Part) -> bool:
        """Whether the part did not raise."""
        begin, deadline = time.perf_counter(), time.monotonic() + part.share * self.seconds
        self.setting.deadline = min(deadline, self.end)
        cut, errors = "", 0
        try:
            lines = part.run(self.setting)
            while True:
                if time.monotonic() > self.setting.deadline:
                    cut = "its time was over: what would follow is missing"
                    break
                if (line := next(lines, None)) is None:
                    break
                self.append({"part": name, **line})
                cut = "its rows say what" if line.get("cut") else cut
                errors += "error" in line and not line.get("cut")
            end: Line = {"done": False, "cut": cut} if cut else {"done": True}
            end |= {"errors": errors} if errors else {}
        except Exception as error:
            end = {"done": False, "error": in_words(error), "traceback": traceback.format_exc()}
            print(f"{name}: {end['error']}", file=sys.stderr, flush=True)
        if self.setting.on_cuda:
            end["nvidia_smi"] = card.asked(card.STATE, self.setting.place)
        self.append({"part": name, **end, "wall_seconds": round(time.perf_counter() - begin, 3)})
        return "error" not in end

    def hand_over(self, names: Sequence[str]) -> list[str]:
        """Another process runs the part again, without the kernel that broke the device, and the parts behind it."""
        without = dict.fromkeys((*self.setting.without, *([self.setting.running] if self.setting.running else [])))
        left = (self.end - time.monotonic() - STARTING) / 60
        if len(without) == len(self.setting.without):
            names = names[1:]  # nobody knows what to leave out: the part is not run again
        if not names or left < 0.2:
            return []
        print(f"the device is lost to this process; another one goes on: {', '.join(names)}", flush=True)
        options = {"--out": self.file.parent.resolve(), "--only": ",".join(names), "--device": self.setting.device}
        options |= {"--without": ",".join(without), **({"--minutes": f"{left:.2f}"} if left < math.inf else {})}
        command = [sys.executable, "-m", "benchmarks.gpu_record"]
        command += [str(word) for option in options.items() for word in option]
        done = subprocess.run([*command, *(["--dry-run"] if self.setting.dry_run else [])], cwd=ROOT, check=False)
        return ["the parts that another process ran"] if done.returncode else []


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_record", description=__doc__)
    out_help = "folder for record.jsonl; --dry-run needs none and takes a temporary one"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    parser.add_argument("--device", help="default: cuda where torch sees one, else cpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does every part run")
    parser.add_argument("--only", metavar="PARTS", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument(
        "--baselines", action="store_true", help="HuggingFace's model alone, in every way it can be run"
    )
    minutes_help = f"parts are cut so that all take no longer; default: {MINUTES} on a GPU, no end on a CPU"
    parser.add_argument("--minutes", type=float, help=minutes_help)
    parser.add_argument("--without", default="", metavar="KERNELS", help='left out: "attention triton,unpad cuda"')
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = parser_of()
    given = parser.parse_args(arguments)
    parts = BASELINES if given.baselines else PARTS
    names = given.only.split(",") if given.only else list(parts)
    unknown = [name for name in names if name not in parts]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are: {', '.join(parts)}")
    without = tuple(filter(None, given.without.split(",")))
    kernels = {f"{op.name} {backend}" for op in ops.ALL for backend in op.backends}
    if strangers := [name for name in without if name not in kernels]:
        parser.error(f"no kernel is called {', '.join(strangers)}; one is called attention triton")
    if given.out is None and not given.dry_run:
        parser.error("--out DIR is needed: where the record goes")
    device = given.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            print("torch sees no CUDA device: recording the CPU")
    elif device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu records the CPU")
    file = (given.out or Path(tempfile.mkdtemp(prefix="gpu_record-"))) / "record.jsonl"
    minutes = given.minutes or (MINUTES if device.startswith("cuda") else math.inf)
    recorder = Recorder(Setting(device, given.dry_run, without), file, 60 * minutes)
    if minutes < math.inf:  # a kernel that never ends keeps no row: those before it are in the file
        faulthandler.dump_traceback_later(60 * minutes + GRACE, exit=True, file=sys.__stderr__)
    try:
        broken = recorder.run({name: parts[name] for name in names})
    finally:
        faulthandler.cancel_dump_traceback_later()
    table.show(recorder.rows(), Console(width=None if sys.stdout.isatty() else 150))
    print(f"{file}" + (f": {', '.join(broken)} raised" if broken else ""))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
