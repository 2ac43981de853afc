"""Compiles the Triton kernels for cards that are not there: python -m benchmarks.compiled [--arch 80,90] [--only REGEX]

Every op's own function is called on CPU tensors, as a model would call it. A driver that stands in for a card's lets
Triton choose the specialisation of each launch; that is compiled, by the compiler that a GPU's machine would run, and
launched nowhere. Its machine code is then held to what every kernel must keep. Exit code 1: something does not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import triton
from fastbert.kernels.cards import Card, imitate
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks import sass
from fastbert import ops
from fastbert.dtypes import DTYPES
from fastbert.ops import sample_calls
from fastbert.ops.registry import Op
from fastbert.ops.sample_calls import Draw, Sizes

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9, at the first specialisation

# sm_XX → the card of it that is meant: A100, RTX A6000, L40S, H100 and H200, B200, RTX 5090
CARDS = {arch: Card(arch, count) for arch, count in ((80, 108), (86, 84), (89, 142), (90, 132), (100, 148), (120, 170))}
# Heads, head dim, intermediate size.
SIZES = {
    "base": (12, 64, 3072),
    "large": (16, 64, 4096),
    "MiniLM": (12, 32, 1536),
    "odd": (3, 72, 500),  # no size is a power of two or a multiple of a tile's
    "wide": (8, 128, 4096),  # the largest head dim
}
BATCHES = {
    "one": (7,),  # a single short text: fewer rows than any tile
    "mixed": (40, 64, 0, 17, 100, 128, 200, 256, 400, 512, 600),  # every class of lengths, an empty row
    "dense": (128,) * 64,  # more rows than one wave of blocks
}
MOST_STACK, MOST_FLAGS = 64, 3  # bytes; boolean constexpr parameters


class AheadDriver:
    """What Triton asks of a driver when it specialises and compiles, answered for a card that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # JITFunctions keep what they know of a target under the device's number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel that took place on no card.

    Args:
        function, arch: the kernel, and the card's.
        signature: parameter → type; "constexpr" also of an argument that Triton made a constant (None, 1).
        constants, attributes: of the constexprs the values; what Triton knows of the others (divisible by 16).
        options: num_warps, num_stages and the like, as the backend completes them.
        grid: the blocks.
        tiles: the dataclass of tile sizes in the function that launched it; None: it has none.
    """

    function: JITFunction[Any]
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    grid: tuple[int, ...]
    tiles: Any

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def chosen(self) -> dict[str, Any]:
        """The constexpr parameters of the kernel, with their values."""
        parameters = self.function.params
        return {parameters[at].name: value for (at, *_), value in self.constants.items() if parameters[at].is_constexpr}

    @property
    def instance(self) -> str:
        """What the kernel's author chooses: the kernel, its constexprs and options."""
        return (
            f"{self.function.module}.{self.name} sm_{self.arch} {sorted(self.chosen.items(), key=str)} {self.options}"
        )

    @property
    def specialisation(self) -> str:
        """What is compiled: an instance, and what Triton takes from the arguments."""
        return f"{self.instance} {self.signature} {sorted(self.constants.items(), key=str)} {self.attributes}"

    @property
    def types(self) -> str:
        """What Triton takes from the arguments, for people."""
        divisible = {at for (at, *_), attributes in self.attributes.items() if attributes}
        kinds = [(name, kind, at in divisible) for at, (name, kind) in enumerate(self.signature.items())]
        return ", ".join(f"{name}: {kind}{'/16' * by_16}" for name, kind, by_16 in kinds if kind != "constexpr")

    @property
    def words(self) -> str:
        """dtypes and constants, for people."""
        pointers = " ".join(kind for kind in self.signature.values() if kind.startswith(("*", "tensordesc")))
        kinds = re.findall(r"\b(?:bf|fp)\d+", pointers) or re.findall(r"\bu?i\d+", pointers)
        fixed = {self.function.params[at].name: value for (at, *_), value in self.constants.items()}
        values = [f"{name}={getattr(value, 'value', value)}" for name, value in fixed.items()]
        return " ".join(["/".join(dict.fromkeys(kinds)) or "-", *values])


@contextlib.contextmanager
def recorded(card: Card) -> Iterator[list[Launch]]:
    """Launches of kernels on CPU tensors are recorded as those on `card`; nothing is compiled, nothing is computed."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: the interpreter compiles nothing, unset it in a process of its own"
        )
    launches: list[Launch] = []
    run, compile_, before = JITFunction.run, JITFunction._do_compile, driver._active
    specialised: list[tuple[Any, ...]] = []

    def note(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, *_: Any
    ) -> None:
        specialised.append((signature, constants, attributes, options))

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **kwargs)
        signature, constants, attributes, options = specialised.pop()
        if callable(grid):
            named = {name: value for name, value in kwargs.items() if name in self.arg_names}
            bound = self.signature.bind(*args, **named)
            bound.apply_defaults()
            grid = grid(bound.arguments)
        tiles = tiles_of(inspect.currentframe(), options)
        launches.append(Launch(self, card.arch, signature, constants, attributes, options, tuple(grid), tiles))

    JITFunction.run, JITFunction._do_compile = launch, note
    driver.set_active(AheadDriver(card.arch))
    try:
        with imitate(card):
            yield launches
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_
        driver.set_active(before)


def tiles_of(frame: FrameType | None, options: Any) -> Any:
    """The tile sizes among the local variables of the function that launches: a dataclass with `num_warps`."""
    while frame is not None:
        ours = frame.f_globals is not globals() and not frame.f_globals["__name__"].startswith("triton.")
        found = {name: value for name, value in frame.f_locals.items() if ours and is_tiles(value)}
        fitting = [value for value in found.values() if fits(value, options)]
        if found:
            return found.get("tiles") or next(iter(fitting or found.values()))
        frame = frame.f_back
    return None


def is_tiles(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "num_warps")


def fits(tiles: Any, options: Any) -> bool:
    return all(getattr(tiles, name, None) == getattr(options, name) for name in ("num_warps", "num_stages"))


# What is launched


def calls(op: Op, sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of an op, of a backward with every gradient needed and with the first alone; what the op's forward saved is
    of the right shape only.
    """
    draw, forward = Draw(sizes, dtype), op.forward or op
    with mock.patch.object(sample_calls.reference, "dropout_bits", ops.dropout_bits.fake):  # their values are not read
        made = list(sample_calls.MAKERS[forward.name](draw))
    for what, drawn in made:
        arguments = tuple(map(aligned, drawn))
        if op is forward:
            if op is not ops.unpad or len(arguments) > 1:  # else it reads the number of tokens, which nothing wrote
                yield what, arguments
            continue
        found = sample_calls.outputs(forward.fake(*arguments))
        grad = torch.empty_like(found[0])
        arguments = sample_calls.backward_arguments(forward, arguments, found, grad)
        yield what, arguments
        if "needed" in op.arguments():
            yield f"{what}, one gradient", (*arguments[:-1], [True] + [False] * (len(arguments[-1]) - 1))


def aligned(argument: Any) -> Any:
    """A tensor as torch allocates them, where a sample is a part of another one: its address is divisible by 16."""
    return argument.clone() if isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 else argument


def kernel_functions(op: Op) -> tuple[Callable[..., Any], Callable[..., list[str]]] | None:
    """An op's function in `kernels/` and what says why it refuses a call; None: it is not there."""
    name = f"fastbert.kernels.{op.name.removesuffix('_backward')}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    found = getattr(module, op.name, None)
    return found and (found, getattr(module, f"{op.name}_reasons"))


def chosen_dtypes(op: Op, names: Sequence[str]) -> list[torch.dtype]:
    """The dtypes of an op's main input: the named ones, and those that are no floats."""
    known = {DTYPES[name] for name in names}
    return [dtype for dtype in sample_calls.dtypes(op) if dtype in known or not dtype.is_floating_point]


@contextlib.contextmanager
def settings(tf32: bool = False, deterministic: bool = False) -> Iterator[None]:
    """torch's switches that kernels obey."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        matmul.allow_tf32 = before[0]
        torch.use_deterministic_algorithms(before[1])


class NeverWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU to learn a value of a tensor or a size that depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        chosen = (args[1] or ()) if name in ("index", "index_put", "index_put_") else ()
        if name in self.WAITS or any(index is not None and index.dtype == torch.bool for index in chosen):
            raise RuntimeError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@dataclass
class Plan:
    """What is compiled: specialisation → the op of its first launch, and that launch; which calls no kernel takes."""

    launches: dict[str, tuple[str, Launch]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, op: Op, where: str, card: Card, arguments: tuple[Any, ...]) -> None:
        """Calls an op's function, if there is one that takes the call, for a card."""
        functions = kernel_functions(op)
        assert functions is not None
        launch, refuse = functions
        with recorded(card) as found:
            try:
                if reasons := refuse(*arguments):
                    self.refused.append(f"{op.name}, {where}, sm_{card.arch}: {'; '.join(reasons)}")
                    return
                with NeverWaiting():
                    launch(*arguments)
            except Exception as error:
                self.failed.append(f"{op.name}, {where}, sm_{card.arch}: {type(error).__name__}: {error}")
        for each in found:
            self.launches.setdefault(each.specialisation, (op.name, each))


def plan(
    archs: Iterable[int],
    only: str = "",
    sizes: Sequence[str] = tuple(SIZES),
    batches: Sequence[str] = tuple(BATCHES),
    dtypes: Sequence[str] = tuple(DTYPES),
) -> Plan:
    """Every launch of every op's kernels for these cards, sizes and dtypes, each specialisation once."""
    found, cards = Plan(), [CARDS[arch] for arch in archs]
    for op in ops.ALL:
        if not re.search(only, op.name) or kernel_functions(op) is None:
            continue
        for dtype in chosen_dtypes(op, dtypes):
            switches = [{}, {"tf32": True}] if dtype == torch.float32 else [{}]
            switches += [{"deterministic": True}] if op.forward else []
            for size, batch in ((size, batch) for size in sizes for batch in batches):
                for what, arguments in calls(op, Sizes(BATCHES[batch], *SIZES[size]), dtype):
                    where = f"{str(dtype).removeprefix('torch.')}, {size}, {batch}, {what}"
                    for card, switch in itertools.product(cards, switches):
                        with settings(**switch):
                            found.add(op, where, card, arguments)
    return found


# What becomes of it


@dataclass
class Row:
    """A compiled kernel: what it asks of the card, and in words what it does not keep.

    seconds: of the compiler; None: Triton had it in its cache. loop: the innermost loop with most tensor core
    instructions, or else the longest.
    """

    op: str
    kernel: str
    arch: int
    words: str
    warps: int
    stages: int
    failures: list[str]
    seconds: float | None = None
    registers: int = 0
    stack: int = 0
    spills: int = 0
    loop_spills: int = 0
    shared: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    loads: int = 0  # of 128 bits
    stores: int = 0
    blocks: int = 0  # on a multiprocessor at a time
    limit: str = ""  # what limits them
    instructions: int = 0
    loop: int = 0

    @property
    def label(self) -> str:
        return f"{self.op}: {self.kernel}"

    @property
    def name(self) -> str:
        return f"{self.label} on sm_{self.arch} ({self.words}, {self.warps} warps, {self.stages} stages)"


def row_of(op: str, launch: Launch, *failures: str) -> Row:
    options = launch.options
    return Row(op, launch.name, launch.arch, launch.words, options.num_warps, options.num_stages, list(failures))


def compile_row(op: str, launch: Launch) -> Row:
    """Compiles a recorded launch and judges it."""
    row, cached = row_of(op, launch), list[bool]()
    driver.set_active(AheadDriver(launch.arch))
    triton.knobs.compilation.listener = lambda **told: cached.append(told["cache_hit"])
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    start = time.perf_counter()
    kernel = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options.__dict__)
    row.seconds = None if any(cached) else time.perf_counter() - start
    tensor_columns = getattr(kernel.metadata, "tmem_size", None) or 0
    read_code(row, sass.disassemble(kernel.asm["cubin"], tools()), kernel.metadata.shared, tensor_columns)
    row.failures = failures(row, launch)
    return row


def read_code(row: Row, code: sass.Code, shared: int, tensor_columns: int) -> None:
    """Puts into a row what its machine code says."""
    row.registers, row.stack, row.shared, row.instructions = code.registers, code.stack, shared, len(code.instructions)
    row.spills = sum(map(sass.is_spill, code.instructions))
    row.loop_spills = sum(sum(map(sass.is_spill, loop)) for loop in code.loops)
    row.tensor_core = sass.tensor_core(code.instructions)
    row.loads, row.stores = (
        sum(i.kind in kinds and ".128" in i.name for i in code.instructions) for kinds in (("LDG", "LDGSTS"), ("STG",))
    )
    row.loop = len(max(code.loops, key=lambda loop: (sum(sass.tensor_core(loop).values()), len(loop)), default=()))
    held = sass.blocks_per_multiprocessor(row.arch, row.registers, row.warps, shared, tensor_columns)
    row.limit, row.blocks = min(held.items(), key=lambda item: item[1])


def failures(row: Row, launch: Launch) -> list[str]:
    """In words, which criteria a compiled kernel does not keep."""
    found = []
    if row.loop_spills:
        found.append(f"{row.loop_spills} LDL and STL in an innermost loop: registers are spilled there")
    if row.stack > MOST_STACK:
        found.append(f"a stack of {row.stack} bytes, over {MOST_STACK}")
    if row.shared > CARDS[row.arch].shared_memory:
        found.append(f"{row.shared} bytes of shared memory, the card has {CARDS[row.arch].shared_memory} for a block")
    if row.arch == 90 and (count := row.tensor_core.get("HMMA")) and not exception(launch):
        found.append(f"{count} HMMA where sm_90 has HGMMA, and EXCEPTIONS of its module does not say why")
    declared = getattr(launch.tiles, "ctas", None)
    if declared is not None and row.blocks < declared:
        found.append(f"{row.blocks} CTAs an SM by its {row.limit}, its tiles declare {declared}")
    most = getattr(launch.tiles, "instructions", None)
    if most is not None and row.loop > most:
        found.append(f"{row.loop} instructions in the innermost loop, its tiles declare {most} at most")
    flags = [name for name, value in launch.chosen.items() if isinstance(getattr(value, "value", value), bool)]
    if len(flags) > MOST_FLAGS:
        found.append(f"{len(flags)} boolean constexpr flags ({', '.join(flags)}), over {MOST_FLAGS}")
    return found


def exception(launch: Launch) -> str:
    """Why a kernel may hold HMMA on sm_90, as its module declares; "": it may not.

    A key of EXCEPTIONS is a kernel's name, or that and values of its constexprs: "kernel BLOCK_M=32 D=16".
    """
    declared: dict[str, str] = getattr(sys.modules[launch.function.module], "EXCEPTIONS", {})
    chosen = {f"{name}={getattr(value, 'value', value)}" for name, value in launch.chosen.items()}
    for key, why in declared.items():
        name, *conditions = key.split()
        if name == launch.name and chosen.issuperset(conditions):
            return why
    return ""


def tools() -> Path:
    """The folder of Triton's own cuobjdump and nvdisasm."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_all(planned: Iterable[tuple[str, Launch]], jobs: int = 2) -> Iterator[Row]:
    """Compiles each launch in a process of its own, as LLVM ends the process where it fails; `jobs` at a time."""
    context, waiting = multiprocessing.get_context("fork"), list(planned)[::-1]
    running: dict[Any, tuple[Any, str, Launch, Any]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            op, launch = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            said = tempfile.TemporaryFile("w+")  # noqa: SIM115
            process = context.Process(target=compile_in_child, args=(theirs, said, op, launch))
            process.start()
            theirs.close()
            running[ours] = process, op, launch, said
        for ours in connection.wait(list(running)):
            process, op, launch, said = running.pop(ours)
            try:
                result = ours.recv()
            except EOFError:
                process.join()
                said.seek(0)
                result = f"the compiler ended with {process.exitcode}: {' '.join(said.read().split())[-300:]}"
            process.join()
            said.close()
            if isinstance(result, str):
                result = row_of(op, launch, result)
            yield result


def compile_in_child(pipe: Any, said: Any, op: str, launch: Launch) -> None:
    """Sends the row of a launch, or in words why there is none."""
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    warnings.simplefilter("ignore")
    try:
        pipe.send(compile_row(op, launch))
    except Exception as error:
        pipe.send(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:500]}")


# Ragged batches


@dataclass
class Ragged:
    """What batches of other lengths compile: specialisations of the first, in words those that later ones add.

    known: of tiles that were compiled before; tiles: of others, which a launch chose by the batch.
    """

    first: int = 0
    known: list[str] = field(default_factory=list)
    tiles: list[str] = field(default_factory=list)


def recompiles(op: Op, dtype: torch.dtype, card: Card, batches: Sequence[tuple[int, ...]]) -> Ragged:
    """What the lengths of these batches compile, one after another, of a small model."""
    functions = kernel_functions(op)
    assert functions is not None
    found, seen = Ragged(), dict[str, str]()
    for number, lengths in enumerate(batches):
        for what, arguments in calls(op, Sizes(lengths, 2, 64, 256), dtype):
            with recorded(card) as launches:
                functions[0](*arguments)
            for launch in launches:
                if number and launch.specialisation not in seen:
                    where = f"batch {number} of {sum(lengths)} tokens, {what}"
                    if launch.instance in seen.values():
                        found.known.append(f"{where}: {launch.name} again for {launch.types}")
                    else:
                        found.tiles.append(f"{where}: {launch.name} with other tiles, {launch.words}")
                seen.setdefault(launch.specialisation, launch.instance)
        found.first = found.first or len(seen)
    return found


def ragged_batches(count: int = 30) -> list[tuple[int, ...]]:
    """Lengths at random, some in every class of lengths; of every third batch the tokens are a multiple of 16, of every
    fifth the sequences.
    """
    draw, batches = random.Random(0), list[tuple[int, ...]]()
    classes = [*itertools.pairwise((0, *ops.LENGTH_CLASSES, 600))]
    for number in range(count):
        size = 16 if number % 5 == 1 else draw.randint(6, 20)
        chosen = [*classes, *(draw.choice(classes) for _ in range(size - len(classes)))]
        lengths = [draw.randint(low + 1, high) for low, high in chosen]
        lengths[0] = 33 + (-(33 + sum(lengths[1:])) % 16 if number % 3 == 1 else draw.randint(0, 15))
        batches.append(tuple(draw.sample(lengths, size)))
    return batches


# What is told


COLUMNS = ("warps", "stages", "registers", "stack", "spills", "in loop", "shared", "tensor core", "LDG.128", "STG.128",
           "CTAs", "loop", "all", "s")  # fmt: skip


def figures(row: Row) -> list[str]:
    tensor_core = ", ".join(f"{count} {kind}" for kind, count in row.tensor_core.items()) or "-"
    numbers = [row.warps, row.stages, row.registers, row.stack, row.spills, row.loop_spills, row.shared, tensor_core]
    numbers += [row.loads, row.stores, f"{row.blocks} ({row.limit})", row.loop, row.instructions]
    return [*map(str, numbers), "cached" if row.seconds is None else f"{row.seconds:.1f}"]


def table(rows: Sequence[Row]) -> Table:
    """One line a compiled specialisation."""
    found = Table(title="Compiled kernels", title_justify="left", header_style="bold")
    for name in ("kernel", "sm", "specialisation"):
        found.add_column(name, overflow="fold")
    for name in COLUMNS:
        found.add_column(name, justify="right")
    for row in rows:
        style = "red" if row.failures else None
        found.add_row(row.label, str(row.arch), row.words, *figures(row), style=style)
    return found


DOCUMENT = """\
# Kernels, compiled

Written by `python -m benchmarks.compiled --out docs/kernels.md`; do not edit. These are the launches that the ops
make on cards that were not there, compiled by the ptxas that Triton brings; nothing here was timed. A line is a kernel
on a card, with its least and its greatest figure over its specialisations (dtypes, tiles, flags). Spills: LDL and STL
in all of the kernel. Loop: instructions of the innermost loop. Bytes of stack and shared memory.

A kernel keeps, or is listed below its table: no LDL or STL in an innermost loop, at most {stack} bytes of stack, the
card's shared memory, no HMMA where sm_90 has HGMMA unless its file says why, the CTAs an SM that its tiles declare, at
most {flags} boolean constexpr flags.
"""
HEADING = "\n## Triton "


def document(old: str, rows: Sequence[Row], scope: str, failed: Sequence[str]) -> str:
    """docs/kernels.md with the part of this Triton written anew."""
    old, of_cuda, cuda = old.partition("\n## CUDA\n")  # which benchmarks.compiled_cuda writes
    parts = {part.split(None, 1)[0]: part for part in old.split(HEADING)[1:]}
    lines = [triton.__version__, "", scope, ""]
    lines += ["| kernel | sm | compiled | registers | stack | spills | shared | tensor cores | CTAs an SM | loop |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for (label, arch), group in itertools.groupby(rows, key=lambda row: (row.label, row.arch)):
        alike = list(group)
        cores = ", ".join(sorted({kind for row in alike for kind in row.tensor_core})) or "-"
        spans = [span(getattr(row, name) for row in alike) for name in ("registers", "stack", "spills", "shared")]
        ends = [span(getattr(row, name) for row in alike) for name in ("blocks", "loop")]
        lines.append(f"| {' | '.join([f'`{label}`', str(arch), str(len(alike)), *spans, cores, *ends])} |")
    lines += ["", *(f"- {reason}" for reason in failed)] if failed else ["", "All of them keep the criteria."]
    for key, why in exceptions(rows).items():
        lines += ["", f"HMMA on sm_90, `{key}`: {why}"]
    parts[triton.__version__] = "\n".join(lines) + "\n"
    text = DOCUMENT.format(stack=MOST_STACK, flags=MOST_FLAGS)
    return text + "".join(HEADING + parts[version] for version in sorted(parts)) + of_cuda + cuda


def span(values: Iterable[int]) -> str:
    """The least and the most."""
    found = sorted(values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def exceptions(rows: Iterable[Row]) -> dict[str, str]:
    """The EXCEPTIONS of the modules of these kernels."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(row.op.removesuffix("_backward") for row in rows):
        found |= getattr(sys.modules.get(f"fastbert.kernels.{name}"), "EXCEPTIONS", {})
    return found


def names(text: str) -> list[str]:
    return text.split(",")


def tell_ragged(console: Console, archs: Iterable[int], only: str, dtypes: Sequence[str]) -> int:
    """Prints what the first of 30 ragged batches compiles, and what others add; exit code 1: something."""
    batches, failed = ragged_batches(), 0
    for op in ops.ALL:
        if not re.search(only, op.name) or kernel_functions(op) is None:
            continue
        for dtype, arch in itertools.product(chosen_dtypes(op, dtypes), archs):
            where = f"{op.name}, {str(dtype).removeprefix('torch.')}, sm_{arch}"
            found = recompiles(op, dtype, CARDS[arch], batches)
            alone = recompiles(op, dtype, CARDS[arch], [(17, 3), (1,), (16,), (16, 16)])
            console.print(f"{where}: {found.first} specialisations for the first of {len(batches)} batches")
            for reason in dict.fromkeys([*found.known, *found.tiles, *alone.known]):
                console.print(f"FAILED: {where}: {reason}", markup=False, style="red")
                failed += 1
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--arch", default=",".join(map(str, CARDS)), help="sm_XX, without sm_")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the op's name")
    parser.add_argument("--sizes", type=names, default=list(SIZES), help=", ".join(SIZES))
    parser.add_argument("--batches", type=names, default=list(BATCHES), help=", ".join(BATCHES))
    parser.add_argument("--dtypes", type=names, default=list(DTYPES), help=", ".join(DTYPES))
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--ragged", action="store_true", help="compile nothing: what do 30 ragged batches recompile")
    parser.add_argument("--out", type=Path, help="docs/kernels.md: this Triton's part of it is written anew")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 220)
    archs = [int(arch) for arch in names(options.arch)]
    if options.ragged:
        return tell_ragged(console, archs, options.only, options.dtypes)
    start = time.perf_counter()
    planned = plan(archs, options.only, options.sizes, options.batches, options.dtypes)
    count = len(planned.launches)
    console.print(f"Triton {triton.__version__}: {count} specialisations ({time.perf_counter() - start:.0f} s)")
    rows = sorted(compile_all(planned.launches.values(), options.jobs), key=lambda row: (row.op, row.kernel, row.arch))
    console.print(table(rows))
    for reason in dict.fromkeys(planned.refused):
        console.print(f"refused: {reason}", markup=False)
    failed = [*planned.failed, *(f"{row.name}: {reason}" for row in rows for reason in row.failures)]
    for reason in failed:
        console.print(f"FAILED: {reason}", markup=False, style="red")
    console.print(f"{len(rows)} compiled, {len(failed)} failures, {time.perf_counter() - start:.0f} s")
    if options.out:
        scope = (
            f"sm_{', '.join(map(str, archs))}; dtypes {', '.join(options.dtypes)}; sizes {', '.join(options.sizes)}; "
            f"batches {', '.join(options.batches)}; torch {torch.__version__}"
        )
        old = options.out.read_text() if options.out.exists() else ""
        options.out.write_text(document(old, rows, scope, failed))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
