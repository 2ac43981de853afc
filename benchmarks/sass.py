"""What a compiled kernel asks of a card, read from its machine code: registers, loops, spills, tensor cores."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
ADDRESS = re.compile(r"\b0x([0-9a-f]+)\s*$")
TENSOR_CORE = re.compile(r"(?:UTC)?[A-Z]G?MMA$")  # HMMA, HGMMA, UTCHMMA and their kin
WAITS = ("SYNCS", "NANOSLEEP", "WARPSYNC", "YIELD", "NOP", "BRA", "UCGABAR_WAIT")  # what a loop that only waits holds

REGISTERS, REGISTER_UNIT, PARTITIONS = 65536, 256, 4  # a multiprocessor's, how many a warp takes at a time
RESERVED, SHARED_UNIT, TENSOR_COLUMNS = 1024, 128, 512  # bytes that the driver takes of each block's shared memory


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, "Technical specifications")."""

    shared_memory: int
    warps: int
    blocks: int


LIMITS = {
    80: Limits(167936, 64, 32),
    86: Limits(102400, 48, 16),
    89: Limits(102400, 48, 24),
    90: Limits(233472, 64, 32),
    100: Limits(233472, 64, 32),
    120: Limits(102400, 48, 24),
}


@dataclass(frozen=True)
class Instruction:
    """address in bytes; name with its suffixes; the predicate, "" for none; the operands as printed."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = ADDRESS.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def always(self) -> bool:
        """Whether no lane goes on to the next instruction, if this one branches or exits."""
        return self.predicate in ("", "PT") and (self.kind in ("EXIT", "RET") or self.operands.strip()[:2] == "0x")


@dataclass(frozen=True)
class Code:
    """A kernel's machine code: registers a thread, bytes of stack, its instructions, those of each innermost loop."""

    registers: int
    stack: int
    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[Instruction, ...], ...]


def disassemble(cubin: bytes, tools: Path) -> Code:
    """The code of a cubin; `tools`: the folder of cuobjdump and nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [(int(registers), int(stack)) for registers, stack in USAGE.findall(printed)]
    functions = [parse(text) for text in re.split(r"^\s*Function :", printed, flags=re.MULTILINE)[1:]]
    return Code(
        max(registers for registers, _ in found),
        max(stack for _, stack in found),
        tuple(itertools.chain.from_iterable(functions)),
        tuple(loop for function in functions for loop in innermost_loops(function)),
    )


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions of one function, as cuobjdump prints them."""
    found = CODE.findall(text)
    return tuple(Instruction(int(address, 16), *rest) for address, *rest in found)


def innermost_loops(code: Sequence[Instruction]) -> list[tuple[Instruction, ...]]:
    """The instructions of each natural loop that holds no other (Aho et al., "Compilers", 9.6); waiting is no loop.

    Blocks that stand behind the end of a function, as ptxas puts what is seldom run, count to the loop that they go
    back to.
    """
    blocks, successors = graph(code)
    dominators = dominating(successors)
    loops: dict[int, set[int]] = {}
    for source, targets in enumerate(successors):
        for header in targets:
            if dominators[source] >> header & 1:
                loops.setdefault(header, {header}).update(body(header, source, successors))
    working = {
        header: blocks_of
        for header, blocks_of in loops.items()
        if any(i.kind not in WAITS for block in blocks_of for i in blocks[block])
    }
    inner = [
        mine
        for header, mine in working.items()
        if not any(other < mine for key, other in working.items() if key != header)
    ]
    return [tuple(i for block in sorted(mine) for i in blocks[block]) for mine in inner]


def graph(code: Sequence[Instruction]) -> tuple[list[Sequence[Instruction]], list[list[int]]]:
    """The basic blocks of a function, and which blocks may follow each."""
    at = {instruction.address: n for n, instruction in enumerate(code)}
    ends = ("BRA", "JMP", "EXIT", "RET", "CALL", "BSYNC")
    starts = {0} | {at[i.target] for i in code if i.kind in ("BRA", "JMP", "CALL", "BSSY") and i.target in at}
    starts |= {n + 1 for n, i in enumerate(code) if i.kind in ends and n + 1 < len(code)}
    order = sorted(starts)
    number = {code[start].address: n for n, start in enumerate(order)}
    blocks = [code[start:end] for start, end in itertools.pairwise([*order, len(code)])]
    successors: list[set[int]] = [set() for _ in blocks]
    # Convergence barriers that may be set where a block begins, each with the address where its lanes go on together
    joins: list[set[tuple[str, int]]] = [set() for _ in blocks]
    waiting, seen = [0], set[int]()
    while waiting:
        n = waiting.pop()
        seen.add(n)
        block, known = blocks[n], set(joins[n])
        for i in block:
            if i.kind == "BSSY" and i.target is not None:
                barrier = i.operands.split(",")[0].strip()
                known = {join for join in known if join[0] != barrier} | {(barrier, i.target)}
        last = block[-1]
        if last.kind == "BSYNC":
            targets = {target for barrier, target in known if barrier == last.operands.strip()} - {last.address}
            goes_on = not targets
        else:
            targets = {last.target} if last.kind in ("BRA", "JMP", "CALL") and last.target is not None else set()
            goes_on = last.kind not in ("BRA", "JMP", "EXIT", "RET") or not last.always
        follow = {number[target] for target in targets if target in number}
        if goes_on and n + 1 < len(blocks):
            follow.add(n + 1)
        successors[n] = follow
        for follower in follow:
            if follower not in seen or not known <= joins[follower]:
                joins[follower] |= known
                waiting.append(follower)
    return blocks, [sorted(follow) for follow in successors]


def dominating(successors: Sequence[Iterable[int]]) -> list[int]:
    """Which blocks every way from block 0 to a block passes, as bits; 0 of a block that cannot be reached."""
    predecessors: list[list[int]] = [[] for _ in successors]
    reached, waiting = {0}, [0]
    while waiting:
        block = waiting.pop()
        for follower in successors[block]:
            predecessors[follower].append(block)
            if follower not in reached:
                reached.add(follower)
                waiting.append(follower)
    everything = (1 << len(successors)) - 1
    found = [everything if block in reached else 0 for block in range(len(successors))]
    found[0], changed = 1, True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = functools.reduce(int.__and__, (found[p] for p in predecessors[block]), everything)
            new = common | 1 << block
            changed |= new != found[block]
            found[block] = new
    return found


def body(header: int, source: int, successors: Sequence[Iterable[int]]) -> set[int]:
    """The blocks of the loop that `source` closes: those that reach it without passing `header`."""
    found, waiting = {header, source}, [source] if source != header else []
    while waiting:
        block = waiting.pop()
        before = {p for p, targets in enumerate(successors) if block in targets} - found
        found |= before
        waiting += before
    return found


def is_spill(instruction: Instruction) -> bool:
    """Whether an instruction moves a register to or from local memory."""
    return instruction.kind in ("LDL", "STL")


def tensor_core(code: Iterable[Instruction]) -> dict[str, int]:
    """Tensor core instructions by kind; those on TF32 operands are kept apart as "HMMA.TF32" and the like."""
    found: dict[str, int] = {}
    for i in code:
        if TENSOR_CORE.match(i.kind):
            kind = f"{i.kind}.TF32" if "TF32" in i.name else i.kind
            found[kind] = found.get(kind, 0) + 1
    return found


def blocks_per_multiprocessor(
    arch: int, registers: int, warps: int, shared: int, tensor_columns: int = 0
) -> dict[str, int]:
    """How many blocks each resource of a multiprocessor holds. A warp's registers stand in one of four partitions."""
    limits = LIMITS[arch]
    per_warp = rounded_up(max(registers, 1) * 32, REGISTER_UNIT)
    found = {
        "registers": REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps,
        "shared memory": limits.shared_memory // rounded_up(shared + RESERVED, SHARED_UNIT),
        "threads": min(limits.warps // warps, limits.blocks),
    }
    if tensor_columns:
        found["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    return found


def rounded_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit
