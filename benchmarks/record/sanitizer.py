"""Part "sanitizer": our kernels on tiny calls under NVIDIA's compute-sanitizer, where it is installed.

    compute-sanitizer --tool memcheck python -m benchmarks.record.sanitizer [--device cuda]

runs every kernel of ours once on its sample calls, and nothing else on the device but copies.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CHECKED
from benchmarks.record.setting import Line, Setting, in_words, moved_to
from fastbert import limits, ops
from fastbert.ops.sample_calls import FLOATS, dtypes, sample_calls
from fastbert.proven import OWN

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
# What the part "load" has compiled already: under a tool the compiler would take too long.
TINY = next(checked.sizes for checked in CHECKED["cuda"] if checked.name == "odd")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
Running = tuple[subprocess.Popen[Any], Any]  # the process, and the file of what it says


def run(setting: Setting) -> Iterator[Line]:
    """Both tools beside one another, each until the part's time is over."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(PLACES))
    if tool is None:
        yield {"what": "compute-sanitizer", "note": "it is not installed here: nothing was looked at"}
        return
    begin, started = time.monotonic(), {name: start(tool, name, setting) for name in TOOLS}
    for name, process in started.items():
        yield {"tool": name, **ended(process, setting, begin)}


def start(tool: str, name: str, setting: Setting) -> Running:
    """A process of this file under a tool; what it says goes to a file, which no pipe can fill."""
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - `ended` closes it
    command = [tool, "--tool", name, "--print-limit", "5", sys.executable, "-m", "benchmarks.record.sanitizer"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is its memory's
    given = {"stdout": said, "stderr": subprocess.STDOUT, "env": environment, "cwd": ROOT}
    return subprocess.Popen([*command, "--device", setting.device], **given), said


def ended(running: Running, setting: Setting, begin: float) -> Line:
    """What a tool found, or in words how far it came."""
    process, said = running
    cut = False
    try:
        process.wait(max(0.1, setting.deadline - time.monotonic()) if setting.deadline < float("inf") else None)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        cut = True
    said.seek(0)
    lines = said.read().splitlines()
    said.close()
    looked = [line.removeprefix("ran ") for line in lines if line.startswith("ran ")]
    raised = [line.removeprefix("raised ") for line in lines if line.startswith("raised ")]
    line: Line = {"kernels": looked, "raised": raised, "exit_code": process.returncode}
    line["seconds"] = time.monotonic() - begin
    summary = SUMMARY.search("\n".join(lines))
    if cut:
        line["cut"] = "the part's time is over"
    elif summary is None:
        line["note"] = f"it gave no summary: {' '.join(lines[-5:])[-500:]}"
    else:
        line |= {"errors": int(summary[1]), "passed": summary[1] == "0" and not raised and process.returncode == 0}
    if not line.get("passed"):
        line["said"] = [text for text in lines if text.startswith("=========")][:40]
    return line


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the kernels; a line for each: "ran attention triton bfloat16"."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record.sanitizer", description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    place = torch.empty(0, device=device).device
    for op in ops.ALL:
        for backend in (b for b in op.order(place.type) if b.name in OWN):
            dtype = torch.bfloat16 if dtypes(op) == FLOATS else dtypes(op)[0]
            name = f"{op.name} {backend.name} {str(dtype).removeprefix('torch.')}"
            try:
                for call in sample_calls(op, TINY, dtype):
                    given = op.packed(backend, moved_to(call.arguments, place))
                    if not backend.reasons(*given):
                        backend.run(*given)
                        limits.synchronize(device)
                print(f"ran {name}", flush=True)
            except Exception as error:
                print(f"raised {name}: {in_words(error)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
