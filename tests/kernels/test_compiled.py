"""Ahead of time: what Triton compiles of every launch that the ops make, for cards that are not here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sass

ROOT = Path(__file__).parents[2]
ALL = "80,86,89,90,100,120"


def python(*arguments, **variables):
    """A process in which Triton compiles: its exit code and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-m", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def told(printed):
    """The lines that say what is wrong."""
    return "\n".join(re.findall(r"^FAILED.*(?:\n(?!FAILED).*)*", printed, flags=re.MULTILINE)) or printed


# Main sizes in the dtype of tensor cores: a minute; docs/kernels.md holds the others
QUICK = ["--sizes", "base", "--batches", "mixed", "--dtypes", "bf16"]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_launch_keeps_the_criteria(arch):
    code, printed = python("benchmarks.compiled", "--arch", arch, *QUICK)
    assert code == 0, told(printed)


def test_ragged_batches_recompile_nothing():
    code, printed = python("benchmarks.compiled", "--ragged", "--arch", "90", "--dtypes", "bf16")
    assert code == 0, told(printed)
    assert printed.count("of 30 batches") >= 10, printed


@pytest.fixture(scope="session")
def triton36(tmp_path_factory):
    """A folder with the oldest Triton that is taken."""
    folder = tmp_path_factory.mktemp("triton36")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    subprocess.run([*pip, "--target", folder, "triton==3.6.0"], check=True)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "MiniLM"])
def test_every_launch_on_every_card(size):
    code, printed = python("benchmarks.compiled", "--arch", ALL, "--sizes", size, "--batches", "mixed")
    assert code == 0, told(printed)


@pytest.mark.slow
def test_every_launch_by_the_oldest_triton(triton36):
    code, printed = python("benchmarks.compiled", "--arch", ALL, *QUICK, PYTHONPATH=triton36)
    assert "Triton 3.6.0" in printed and code == 0, told(printed)


def test_what_breaks_a_rule_is_told():
    code, printed = python("tests.kernels.planted")
    assert code == 0, printed
    found = json.loads(printed.splitlines()[-1])
    assert [name for name in found if not found[name]] == ["sound", "HMMA on sm_80", "HMMA, excused"]
    spilled, stack = found.pop("spills")
    assert re.fullmatch(r"\d+ LDL and STL in an innermost loop: registers are spilled there", spilled)
    assert re.fullmatch(r"a stack of \d+ bytes, over 64", stack)
    assert found.pop("ragged") == [3, 1]  # tokens of 16, 17 and 1, of one choice of tiles
    assert found.pop("waits") == ["item", "int", "bool", "nonzero", "boolean index", "masked_select"]
    words = {
        "shared memory": "bytes of shared memory, the card has 101376 for a block",
        "HMMA": "HMMA where sm_90 has HGMMA, and EXCEPTIONS of its module does not say why",
        "HMMA, not excused": "HMMA where sm_90 has HGMMA",
        "CTAs": "CTAs an SM by its registers, its tiles declare 9",
        "instructions": "instructions in the innermost loop, its tiles declare 10 at most",
        "flags": "4 boolean constexpr flags (FIRST, SECOND, THIRD, FOURTH), over 3",
        "compiles not": "CompileTimeAssertionFailure",
        "the compiler dies": "the compiler ended with -6: LLVM ERROR: planted",
    }
    for name, expected in words.items():
        (reason,) = found[name]
        assert expected in reason, name


def listing(*lines):
    return sass.parse("\n".join(f"/*{16 * n:04x}*/  {line} ;  /* 0x00 */" for n, line in enumerate(lines)))


def names(loops):
    return [[instruction.name for instruction in loop] for loop in loops]


def test_nested_loops():
    code = listing(
        "MOV R1, R2", "IADD3 R1", "LDG.E.128 R4", "FADD R4", "@P0 BRA 0x20", "@!P1 BRA 0x10", "EXIT", "BRA 0x70"
    )
    assert names(sass.innermost_loops(code)) == [["LDG.E.128", "FADD", "BRA"]]


def test_what_is_seldom_run_stands_behind_the_end():
    """A wait for a barrier: the branch back to the loop is no loop from there to here."""
    code = listing(
        "HGMMA.64x64x16.F32 R1", "SYNCS.PHASECHK.TRYWAIT P1, [UR4]", "@!P1 BRA 0x70", "STL [R1], R2", "@P0 BRA 0x00",
        "FADD R1", "EXIT", "SYNCS.PHASECHK.TRYWAIT P1, [UR4]", "@!P1 BRA 0x70", "BRA 0x30",
    )  # fmt: skip
    (loop,) = sass.innermost_loops(code)
    assert [i.name for i in loop][:5] == ["HGMMA.64x64x16.F32", "SYNCS.PHASECHK.TRYWAIT", "BRA", "STL", "BRA"]
    assert "FADD" not in [i.name for i in loop] and sum(map(sass.is_spill, loop)) == 1


def test_lanes_that_join_are_no_loop():
    """Two parts of a kernel use one convergence barrier: the second does not go on where the first one's lanes join."""
    code = listing(
        "BSSY B0, 0x40", "@P0 BRA 0x30", "FADD R1", "BSYNC B0", "LDL R2, [R1]", "BSSY B0, 0x90", "@P0 BRA 0x80",
        "FADD R2", "BSYNC B0", "EXIT",
    )  # fmt: skip
    assert sass.innermost_loops(code) == []


def test_a_branch_over_a_loop_and_a_subroutine_are_no_loops():
    code = listing(
        "@P0 BRA 0x30", "CALL.REL.NOINC 0x40", "FADD R1", "EXIT", "MUFU.RCP R1", "RET.REL.NODEC R2 0x0", "BRA 0x40"
    )
    assert sass.innermost_loops(code) == []


def test_tensor_core_instructions_by_kind():
    code = listing(
        "HMMA.16816.F32.BF16 R1", "HMMA.1688.F32.TF32 R1", "HGMMA.64x64x16.F32 R1", "UTCHMMA gdesc[UR4]", "LDSM R1"
    )
    assert sass.tensor_core(code) == {"HMMA": 1, "HMMA.TF32": 1, "HGMMA": 1, "UTCHMMA": 1}


@pytest.mark.parametrize(
    "arch, registers, warps, shared, blocks",
    [
        (80, 128, 4, 0, 4),  # 16 warps of 4096 registers
        (80, 81, 4, 0, 5),  # registers come in eights: 88, of which five warps fit in each partition
        (80, 88, 1, 0, 20),  # and 23 in four partitions without walls
        (80, 168, 8, 0, 1),  # 12 warps
        (80, 255, 8, 0, 1),
        (90, 32, 4, 115712, 2),  # with the kilobyte that the driver takes, half of it
        (90, 32, 4, 115713, 1),
        (89, 24, 8, 0, 6),  # 48 warps
        (86, 24, 1, 0, 16),  # blocks
    ],
)
def test_blocks_on_a_multiprocessor(arch, registers, warps, shared, blocks):
    assert min(sass.blocks_per_multiprocessor(arch, registers, warps, shared).values()) == blocks


def test_tensor_memory_limits_blocks():
    assert sass.blocks_per_multiprocessor(100, 32, 4, 0, 256)["tensor memory"] == 2
