"""What nvcc made of csrc/cuda/: python -m benchmarks.compiled_cuda [--arch 80,90a] [--out docs/kernels.md]

The machine code in fastbert/_native.so is read and held to what every kernel must keep. Nothing is launched. Exit code
1: something does not keep it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.sass import TENSOR_CORE, innermost_loops, is_spill, parse
from fastbert import native

ARCHS = ("75", "80", "86", "89", "90a", "100a", "120a")
MOST_STACK = 64  # bytes
HEADING = "## CUDA\n"
# A file's anonymous namespace: hash, length, file's name, hash; its kernel: length of the name, name and what follows
NAME = re.compile(r"_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}(?:_\d+)?(\d+)(\w+)")
FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)\s*$", re.MULTILINE)
USAGE = re.compile(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel on one card, and what it asks of it; `vectors`: it promises 128-bit accesses."""

    file: str
    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    loads: int  # of 128 bits
    stores: int
    spills: int
    loop_spills: int
    tensor_core: int
    vectors: bool

    @property
    def failures(self) -> list[str]:
        """In words, what it does not keep."""
        found = [f"{self.loop_spills} LDL or STL in an innermost loop"] if self.loop_spills else []
        found += [f"{self.stack} bytes of stack"] if self.stack > MOST_STACK else []
        found += ["no 128-bit load"] if self.vectors and not self.loads else []
        found += ["no 128-bit store"] if self.vectors and not self.stores else []
        return [f"{self.file}: {self.name}, sm_{self.arch}: {what}" for what in found]


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm in Triton's package."""
    spec = find_spec("triton")
    folder = Path(*spec.submodule_search_locations or [], "backends/nvidia/bin") if spec else None
    return folder if folder and (folder / "cuobjdump").exists() else None


def kernels(library: Path, arch: str, folder: Path) -> Iterator[Kernel]:
    """The kernels of a library for a card."""
    command = [str(folder / "cuobjdump"), "-arch", f"sm_{arch}", "-res-usage", "-sass", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(printed)}
    _, *parts = FUNCTION.split(printed)
    for mangled, text in zip(parts[::2], parts[1::2], strict=True):
        found = NAME.search(mangled)
        if found is None or mangled not in usage:
            continue
        file, length, rest = found[1], int(found[2]), found[3]
        code = parse(text)
        registers, stack, shared = usage[mangled]
        wide = [i.kind for i in code if ".128" in i.name]
        in_loops = [i for loop in innermost_loops(code) for i in loop]
        yield Kernel(
            file, rest[:length], arch, registers, stack, shared, loads=wide.count("LDG"), stores=wide.count("STG"),
            spills=sum(map(is_spill, code)), loop_spills=sum(map(is_spill, in_loops)),
            tensor_core=sum(bool(TENSOR_CORE.match(i.kind)) for i in code), vectors="Lb1EEE" in rest,
        )  # fmt: skip


def span(numbers: Iterable[int]) -> str:
    least, most = min(found := list(numbers)), max(found)
    return str(least) if least == most else f"{least} to {most}"


def table(found: Sequence[Kernel]) -> str:
    """In markdown, a line for each kernel and card: least and greatest figures over its instances."""
    lines = [
        "| kernel | sm | instances | registers | stack | spills | shared | 128-bit loads | stores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in found:
        groups.setdefault((kernel.file, kernel.name, kernel.arch), []).append(kernel)
    for (file, name, arch), mine in sorted(groups.items(), key=lambda item: (item[0][:2], ARCHS.index(item[0][2]))):
        figures = (span(getattr(k, what) for k in mine) for what in ("registers", "stack", "spills", "shared"))
        wide = [k for k in mine if k.vectors] or mine
        accesses = (span(getattr(k, what) for k in wide) for what in ("loads", "stores"))
        lines.append(f"| `{file}: {name}` | {arch} | {len(mine)} | {' | '.join((*figures, *accesses))} |")
    return "\n".join(lines)


def section(found: Sequence[Kernel]) -> str:
    failures = [failure for kernel in found for failure in kernel.failures]
    kept = "All keep" if not failures else "\n".join(f"- {failure}" for failure in failures) + "\n\nThe others keep"
    return f"""{HEADING}
Written by `python -m benchmarks.compiled_cuda --out docs/kernels.md`: the kernels of `csrc/cuda/` in the built
library, for cards that were not there; nothing here was timed. A line is a kernel on a card, over its dtypes, with
128-bit accesses and without; accesses are counted in the instances that have them. {kept} no LDL or STL in an
innermost loop, at most {MOST_STACK} bytes of stack, and 128-bit loads and stores where they are promised.

{table(found)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_cuda", description=__doc__)
    parser.add_argument("--arch", default=",".join(ARCHS), help="cards, e.g. 80,90a")
    parser.add_argument("--out", type=Path, help="docs/kernels.md: its section on CUDA is written anew")
    given = parser.parse_args(arguments)
    folder, state = tools(), native.load()
    if folder is None or not state.has_cuda:
        print(state.cuda_reason or "Triton, whose package brings cuobjdump, is not installed", file=sys.stderr)
        return 1
    found = [kernel for arch in given.arch.split(",") for kernel in kernels(native.LIBRARY, arch, folder)]
    text = section(found)
    if given.out:
        before = given.out.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
        given.out.write_text(f"{before}\n\n{text}", encoding="utf-8")
    else:
        print(text)
    failures = [failure for kernel in found for failure in kernel.failures]
    print("\n".join(failures) or f"{len(found)} kernels keep what they must", file=sys.stderr)
    return 1 if failures or not found else 0


if __name__ == "__main__":
    sys.exit(main())
