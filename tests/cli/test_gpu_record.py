import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from benchmarks import cases, gpu_record, stock
from benchmarks.gpu_record import Part
from benchmarks.record import (
    baselines,
    card,
    load,
    models,
    op_times,
    parity,
    processes,
    rivals,
    sanitizer,
    sweep,
    table,
    timer,
)
from benchmarks.record.setting import DeviceLost, Setting
from fastbert import limits, ops
from fastbert.ops import dropout, self_check
from fastbert.ops.registry import Backend
from fastbert.ops.sample_calls import Sizes
from tests import interpreter

ROOT = Path(__file__).parents[2]
FEW = Sizes((3, 0, 5), 1, 16, 32)
CHECKED = cases.Checked("few", "a few tokens", FEW, ("fp32",))


def lines(folder):
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


def dry_run(folder, only, *more):
    return gpu_record.main(["--out", str(folder), "--device", "cpu", "--dry-run", "--only", only, *more])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder))  # there is no compute-sanitizer, whatever this machine has
        patch.setattr(sanitizer, "PLACES", ())
        code = gpu_record.main(["--out", str(folder), "--device", "cpu", "--dry-run"])
    return code, lines(folder)


def of_part(rows, part):
    return [row for row in rows if row["part"] == part and "wall_seconds" not in row]


def test_dry_run_does_every_part(recorded):
    code, found = recorded
    assert code == 0
    assert [row["part"] for row in found if row.get("done")] == list(gpu_record.PARTS)
    assert all(of_part(found, part) for part in gpu_record.PARTS)
    first = found[0]
    assert first["part"] == "provenance"
    assert (first["device"], first["dry_run"]) == ("cpu", True)
    assert first["versions"]["torch"] == torch.__version__
    assert first["nvidia_smi"]["identity"] == {"note": "nvidia-smi is not asked about cpu"}
    assert set(first["tiles"]) == {op.name for op in ops.FORWARD} or "note" in first["tiles"]


def test_dry_run_says_in_words_what_needs_a_gpu(recorded):
    _, found = recorded
    notes = {row["part"]: row["note"] for row in found if "note" in row and row["part"] != "ops"}
    assert notes == {
        "ceilings": "there are no CUDA graphs on cpu",
        "load": "of Triton's kernels none is compiled: they do not run on cpu",
        "parity": "no kernel of ours makes them on cpu",
        "sanitizer": "it is not installed here: nothing was looked at",
        "sweep": "no kernel of Triton's was timed on cpu: there is nothing to sweep",
    }


def test_dry_run_measures_the_four_products(recorded):
    _, found = recorded
    rows = of_part(found, "ceilings")
    assert {row["product"] for row in rows if row["what"] == "F.linear" and "product" in row} == {
        "qkv", "out", "ffn1", "ffn2",
    }  # fmt: skip
    assert all(row["flops_per_second"] > 0 for row in rows if row["what"] in ("F.linear", "sustained"))


def test_dry_run_judges_every_op_and_times_it(recorded):
    _, found = recorded
    judged = {(r["op"], r["backend"]): r["passed"] for r in found if r["part"] == "parity" and "passed" in r}
    timed = [r for r in found if r["part"] == "ops" and "seconds" in r]
    assert {op.name for op in ops.ALL} == {op for op, _ in judged}
    assert all(judged.values())
    for backend in ("torch", "stock"):
        assert {op.name for op in ops.ALL} <= {r["op"] for r in timed if r["backend"] == backend}
    for row in timed:
        assert len(row["samples"]) == row["seconds"]["count"] == 2
        assert row["share_of_limit"] == pytest.approx(row["limit_seconds"] / row["seconds"]["median"])


BACKENDS = ("torch", "cpu")  # that time their stages on a CPU


def test_dry_run_times_torchs_own_and_stages(recorded):
    _, found = recorded
    timed = [row for row in of_part(found, "ops") if row["dtype"] == "fp32"]
    rows = [row for row in timed if row["op"] == "attention"]
    assert {row["backend"] for row in rows} >= {
        "SDPA flash, padded, no mask", "SDPA cuDNN, padded, no mask", "varlen_attn, packed",
    }  # fmt: skip
    assert all("seconds" in row or row["note"].startswith("not here: ") for row in rows)
    staged = {name: Counter(r["op"] for r in timed if r.get("variant") and r["backend"] == name) for name in BACKENDS}
    with_cpu = {
        "attention": 3, "attention_backward": 3, "add_layer_norm": 2, "add_layer_norm_backward": 1,
        "embed_layer_norm": 2, "embed_layer_norm_backward": 1,
    }  # fmt: skip
    products = {
        "linear_gelu": 3, "linear_backward": 2, "linear_gelu_backward": 2, "feed_forward": 2,
        "feed_forward_backward": 2,
    }  # fmt: skip
    of_weights = {"linear_gelu": 3, "feed_forward": 2}  # that are packed
    assert staged == {"torch": with_cpu | products, "cpu": with_cpu | of_weights}


def test_dry_run_compares_models(recorded):
    _, found = recorded
    rows = [row for row in of_part(found, "models") if "seconds" in row]
    by_mode = {(row["mode"], row["engine"], row["dtype"]) for row in rows}
    for mode, dtypes in {"inference": ("fp32", "bf16"), "training": ("fp32",)}.items():
        assert {(mode, e, d) for e in ("huggingface", "fastbert") for d in dtypes} <= by_mode
        assert (mode, "compiled", "fp32") in by_mode
    assert ("inference", "compiled, no mask", "fp32") in by_mode
    ran = next(row["kernels"] for row in of_part(found, "models") if "kernels" in row)
    assert ran.get("encoder_forward cpu", ran.get("feed_forward torch")) == 1


def test_the_table_is_of_the_rows(recorded, capsys):
    _, found = recorded
    table.show(found, Console(width=200))
    shown = capsys.readouterr().out
    for word in ("Parts", "sanitizer", "Ops at tiny in fp32, µs", "feed_forward_backward", "Models, ms", "compiled"):
        assert word in shown
    assert "Failed" not in shown
    table.show(
        [{"part": "parity", "op": "linear", "backend": "triton", "passed": False, "words": "y is off"}], Console()
    )
    shown = capsys.readouterr().out
    assert "Failed" in shown and "linear triton" in shown and "y is off" in shown


def test_a_part_that_raises_is_recorded_and_the_next_runs(tmp_path, monkeypatch, capsys):
    def broken(setting):
        yield {"row": 1}
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu_record.PARTS, "ceilings", Part(broken, 1))
    assert dry_run(tmp_path, "ceilings,provenance") == 1
    rows = lines(tmp_path)
    assert [row["part"] for row in rows] == ["ceilings", "ceilings", "provenance", "provenance"]
    assert rows[0]["row"] == 1  # what was known before is kept
    assert rows[1]["done"] is False
    assert rows[1]["error"] == "RuntimeError: out of luck"
    assert "broken" in rows[1]["traceback"]
    assert rows[3]["done"] is True
    assert "out of luck" in capsys.readouterr().err


def test_a_part_is_cut_when_its_time_is_over(tmp_path, monkeypatch):
    clock = [0.0]

    def slow(setting):
        for _ in range(20):
            clock[0] += 20
            yield {"at": clock[0]}

    def rows_that_say_so(setting):
        yield {"cut": "no time for this one"}
        yield {"row": 2}

    monkeypatch.setattr(gpu_record.time, "monotonic", lambda: clock[0])
    monkeypatch.setitem(gpu_record.PARTS, "ceilings", Part(slow, 0.5))
    monkeypatch.setitem(gpu_record.PARTS, "load", Part(rows_that_say_so, 0.5))
    monkeypatch.setitem(gpu_record.PARTS, "ops", Part(slow, 1.0))
    assert dry_run(tmp_path, "ceilings,load,ops,models", "--minutes", "2") == 0
    rows = lines(tmp_path)
    count = Counter(row["part"] for row in rows)
    ends = {row["part"]: row for row in rows if "wall_seconds" in row}
    assert count == {"ceilings": 5, "load": 3, "ops": 4, "models": 1}, (
        "60 s, as it takes, what is left of 120 s, nothing"
    )
    assert not any(end["done"] for end in ends.values())
    assert ends["load"]["cut"] == "its rows say what"
    assert ends["models"]["cut"] == "its time was over: what would follow is missing"


def test_rows_are_json_whatever_was_measured(tmp_path, monkeypatch):
    odd = {"ratio": float("inf"), "nested": [{"x": float("nan")}], "path": Path("a"), "count": 3}
    monkeypatch.setitem(gpu_record.PARTS, "ceilings", Part(lambda setting: iter([odd]), 1))
    dry_run(tmp_path, "ceilings")
    row = json.loads((tmp_path / "record.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert row == {"part": "ceilings", "ratio": "inf", "nested": [{"x": "nan"}], "path": "a", "count": 3}


def test_every_row_is_in_the_file_before_the_next_is_made(tmp_path, monkeypatch):
    def counting(setting):
        for i in range(3):
            yield {"seen": len((tmp_path / "record.jsonl").read_text().splitlines()) if i else 0}

    monkeypatch.setitem(gpu_record.PARTS, "ceilings", Part(counting, 1))
    dry_run(tmp_path, "ceilings")
    assert [row["seen"] for row in lines(tmp_path)[:3]] == [0, 1, 2]


def test_another_process_goes_on_where_a_kernel_broke_the_device(tmp_path, monkeypatch):
    commands = []

    def breaks(setting):
        setting.running = "attention triton"
        raise DeviceLost("attention triton")
        yield

    monkeypatch.setitem(gpu_record.PARTS, "parity", Part(breaks, 1))
    monkeypatch.setattr(Setting, "is_lost", property(lambda self: True))
    monkeypatch.setattr(
        gpu_record.subprocess, "run", lambda c, **_: commands.append(c) or subprocess.CompletedProcess(c, 0)
    )
    assert dry_run(tmp_path, "parity,ops", "--minutes", "9") == 1
    ((*command,),) = commands
    given = gpu_record.parser_of().parse_args(command[3:])
    assert (given.only, given.without, given.device, given.dry_run) == ("parity,ops", "attention triton", "cpu", True)
    assert given.out == tmp_path and 8 < given.minutes <= 9
    commands.clear()
    assert dry_run(tmp_path, "parity,ops", "--minutes", "9", "--without", "attention triton") == 1
    assert commands[0][commands[0].index("--only") + 1] == "ops", "the same part would break in the same way"


def test_what_was_left_out_is_not_proven(tmp_path, monkeypatch):
    dry_run(tmp_path, "parity,ops", "--without", "unpad cpu")
    rows = [row for row in lines(tmp_path) if row.get("op") == "unpad" and row.get("backend") == "cpu"]
    assert rows and not any(row["passed"] for row in rows if "passed" in row)
    assert not [row for row in rows if "seconds" in row and row["part"] == "ops"]


def test_baselines_are_every_way_of_huggingface(tmp_path, monkeypatch):
    few = {way: baselines.WAYS[way] for way in ("sdpa, no mask", "eager", "flash", "sdpa, max-autotune")}
    monkeypatch.setattr(baselines, "WAYS", few)
    assert gpu_record.main(["--out", str(tmp_path), "--device", "cpu", "--dry-run", "--baselines"]) == 0
    rows = of_part(lines(tmp_path), "baselines")
    assert {row["engine"] for row in rows} == set(baselines.WAYS)
    assert all("seconds" in row or row["note"].startswith("not here: ") for row in rows)
    assert {row["mode"] for row in rows if row["engine"] == "eager"} == {"inference", "training"}


def off(call, backend):
    return False, "off"


def test_a_backend_without_parity_is_not_timed(tmp_path, monkeypatch):
    """Also where the part that reports parity is left out."""
    monkeypatch.setattr(stock, "verdict", off)
    dry_run(tmp_path, "ops")
    found = [row for row in lines(tmp_path) if row["part"] == "ops" and "op" in row]
    rivals_of_torch = ("SDPA", "varlen", "F.", "both F.")
    assert {r["backend"] for r in found if "seconds" in r and not r["backend"].startswith(rivals_of_torch)} == {"stock"}
    silent = {row["op"] for row in found if row.get("note") == "no speed: parity failed: off"}
    assert silent == set(stock.OPS)


def test_parity_is_asked_once_for_each_call_of_each_case(tmp_path, monkeypatch):
    asked = []
    verdict = stock.verdict

    def counted(call, backend):
        asked.append((call.op, backend, call.arguments[0].shape, call.arguments[-1]))
        return verdict(call, backend)

    shorter = dataclasses.replace(cases.TINY_CASES[0], name="shorter", workload="query-1x16")
    monkeypatch.setattr(stock, "verdict", counted)
    monkeypatch.setattr(cases, "TINY_CASES", (cases.TINY_CASES[0], shorter))
    dry_run(tmp_path, "parity,ops")
    found = [r for r in lines(tmp_path) if r["part"] == "parity" and "passed" in r and r["case"] != "tiny edges"]
    assert len(asked) == len(found) == len({(r["op"], r["case"], r["dtype"], r["backend"]) for r in found})
    assert {r["case"] for r in found} == {"tiny", "shorter"}


@pytest.fixture
def planted(monkeypatch):
    """Gives an op a kernel of ours on the CPU, which is what its built-in gives, changed."""

    def plant(op, change, name="cpu"):
        run = op.backends["torch"].run
        backend = Backend(name, lambda *arguments: change(run(*arguments)), devices=("cpu",))
        monkeypatch.setitem(op.backends, name, backend)
        monkeypatch.setattr(op, "_order", {})
        return backend

    return plant


def rows_of(op, backend, setting=None, dtype=torch.float32):
    setting = setting or Setting("cpu", dry_run=True)
    return list(parity.own_kernel(setting, CHECKED, op, backend, dtype)), setting


@pytest.mark.parametrize(
    "op", [ops.add_layer_norm, ops.attention.gradient.op, ops.dropout_bits], ids=lambda op: op.name
)
def test_a_right_kernel_passes_the_checks(op, planted):
    backend = planted(op, lambda found: found)
    dtype = torch.int64 if op is ops.dropout_bits else torch.bfloat16
    ((row,), setting) = rows_of(op, backend, dtype=dtype)
    assert row["passed"], row["words"]
    assert (row["input"], row["reruns"]) == (self_check.name_of(dtype), 2)
    assert not setting.wrong and not setting.failures


def wrong_number(found):
    return found[0] + 0.01, *found[1:]


def unwritten(found):
    """Reads fresh memory, which by chance changes nothing, but for the call in which it is filled with NaN."""
    fresh = torch.empty_like(found[0]) if torch.are_deterministic_algorithms_enabled() else torch.zeros(())
    return torch.where(fresh.isnan(), fresh, found[0]), *found[1:]


def other_bits_each_time(found, count=[0]):  # noqa: B006 - counts its calls
    """The last bit up, down, or as it is."""
    count[0] += 1
    return torch.nextafter(found[0], found[0] + count[0] % 3 - 1), *found[1:]


def raises(found):
    raise RuntimeError("no such tile")


@pytest.mark.parametrize(
    ("change", "words"),
    [(wrong_number, "y is off"), (other_bits_each_time, "rerun 1 gives other bits"),
     (raises, "it raises RuntimeError: no such tile")],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_wrong_kernel_fails_the_checks(change, words, planted):
    backend = planted(ops.add_layer_norm, change)
    ((row,), setting) = rows_of(ops.add_layer_norm, backend)
    assert row["passed"] is False and words in row["words"]
    key = "add_layer_norm", "cpu", "float32"
    assert key in (setting.failures if change is raises else setting.wrong)
    assert list(setting.left_out()) == ["add_layer_norm cpu float32"]
    assert ops.add_layer_norm.doubt(backend, (torch.ones(1, 1),)), "models do without it"


def test_a_kernel_that_leaves_memory_unwritten_fails(planted):
    ((row,), _) = rows_of(ops.add_layer_norm, planted(ops.add_layer_norm, unwritten))
    assert row["passed"] is False
    assert "other results where fresh memory holds NaN" in row["words"]


def test_a_rerun_with_other_bits_fails(planted, monkeypatch):
    monkeypatch.setattr(parity, "same", lambda first, second, seen=[]: seen.append(0) or len(seen) % 3)
    ((row,), _) = rows_of(ops.add_layer_norm, planted(ops.add_layer_norm, lambda found: found))
    assert "rerun 2 gives other bits" in row["words"]  # each call's first comparison is with memory of NaN


def test_a_kernel_that_failed_alone_is_not_launched(planted):
    calls = []
    backend = planted(ops.add_layer_norm, lambda found: calls.append(0) or found)
    setting = Setting("cpu", dry_run=True, failures={("add_layer_norm", "cpu", "float32"): "it failed alone"})
    ((row,), _) = rows_of(ops.add_layer_norm, backend, setting)
    assert (row["passed"], row["words"], calls) == (False, "it failed alone", [])
    assert setting.failure("add_layer_norm", "cpu", (torch.ones(1, 1),)) == "it failed alone"


@pytest.mark.parametrize("wrong", [False, True])
def test_keep_bits_are_the_definitions(wrong, planted):
    planted(ops.dropout_bits, lambda bits: bits ^ int(wrong))
    rows = list(parity.keep_bits(Setting("cpu", dry_run=True)))
    assert [row["passed"] for row in rows] == [not wrong] * 3
    assert rows[0]["bits"] == 2 * (33**2 + 65**2)
    assert {row["case"] for row in rows} == {f"keep bits, p = {p}" for _, _, p in parity.DRAWN}
    assert dropout.threshold(parity.DRAWN[2][2]) < 65536


def broken_work(number):
    if number == 1:
        os._exit(3)
    if number == 2:
        raise ValueError("no")
    return {"number": number}


def test_a_process_that_dies_takes_no_other_with_it():
    found = dict(processes.in_processes(broken_work, [(i,) for i in range(4)], 2, time.monotonic() + 300))
    assert found == {
        (0,): {"number": 0}, (1,): {"error": "its process ended with 3"}, (2,): {"error": "ValueError: no"},
        (3,): {"number": 3},
    }  # fmt: skip


def test_processes_without_time_are_cut():
    found = dict(processes.in_processes(broken_work, [(0,)], 1, time.monotonic() - 1))
    assert found == {(0,): {"error": "the part's time is over", "cut": "no time"}}


def test_what_fails_alone_is_remembered(planted, monkeypatch):
    planted(ops.pad, lambda found: found)
    monkeypatch.setattr(load, "in_processes", lambda work, tasks, *_: ((task, {"error": "it died"}) for task in tasks))
    setting = Setting("cpu", dry_run=True)
    *rows, total = load.run(setting)
    assert {(row["op"], row["backend"]) for row in rows} >= {("pad", "cpu")}
    assert total["failed"] == len(rows)
    assert setting.failures["pad", "cpu", "float32"] == "it failed in a process of its own: it died"


@pytest.fixture
def interpreted():
    if not interpreter.is_here():
        pytest.skip("Triton is not installed")


@pytest.mark.usefixtures("interpreted")
def test_triton_kernels_pass_the_checks(monkeypatch):
    """In its interpreter, which the processes of the load find too."""
    monkeypatch.setattr(Setting, "own", lambda self, op: [op.backends["triton"]] if op is ops.dropout_bits else [])
    setting = Setting("cpu", dry_run=True)
    one, total = load.run(setting)
    assert (one["op"], one["calls"], total["failed"]) == ("dropout_bits", 2, 0), one
    rows = [row for row in parity.run(setting) if row.get("backend") == "triton"]
    assert [row["case"] for row in rows] == ["tiny edges", *(f"keep bits, p = {p}" for _, _, p in parity.DRAWN)]
    assert all(row["passed"] for row in rows), rows


@pytest.mark.usefixtures("interpreted")
def test_the_sweep_changes_tiles_of_the_worst_op(monkeypatch):
    case = dataclasses.replace(cases.TINY_CASES[0], workload="query-1x16")
    monkeypatch.setattr(sweep, "op_cases", lambda *_: ((case, "fp32"),))
    monkeypatch.setattr(sweep, "MOST_CHANGES", 3)
    monkeypatch.setitem(ops.add_layer_norm.backends["triton"].verdicts, (torch.float32, torch.device("cpu")), "")
    common = {"case": "tiny", "dtype": "fp32", "backend": "triton"}
    setting = Setting("cpu", dry_run=True)
    setting.timed = [
        {**common, "op": "linear", "seconds": {"median": 3.0}, "limit_seconds": 2.9},
        {**common, "op": "add_layer_norm", "seconds": {"median": 1.0}, "limit_seconds": 0.1},
        {**common, "op": "attention", "variant": "keep bits", "seconds": {"median": 9.0}, "limit_seconds": 0.1},
    ]
    first, *rows = sweep.run(setting)
    assert (first["op"], first["seconds_lost"]) == ("add_layer_norm", 0.9)
    assert len(first["changes"]) == 3 and "Tiles(" in first["tiles"][0]
    assert {row["tiles"] for row in rows} == {"chosen", *(sweep.in_name(tuple(c)) for c in first["changes"])}
    wrong = [row["note"] for row in rows if "seconds" not in row]
    assert len(wrong) == 1 and wrong[0].startswith("no speed: parity failed: y: "), "half of a row's columns"


@pytest.mark.usefixtures("interpreted")
def test_changed_tiles_are_those_that_are_launched():
    """Also tiles inside others, and those that a module takes from another one."""
    linear, gelu = (ops.kernels.kernel(name) for name in ("linear", "linear_gelu"))
    chooser, seen = linear.choose_tiles, []
    with sweep.replaced("linear", lambda tiles: seen.append(tiles) or tiles):
        gelu.choose_tiles(64, 64, torch.float32, linear.card_of(torch.device("cpu")))
    assert len(seen) == 1
    assert linear.choose_tiles is gelu.choose_tiles is chooser
    attention = ops.kernels.kernel("attention")
    inner = attention.Tiles(64, 32, 4, 1)
    nested = attention.BackwardTiles(None, inner, attention.Tiles(128, 32, 8, 2))
    changed = sweep.altered(nested, ("block_m", 2.0))
    assert (changed.one_pass, changed.dq.block_m, changed.dkdv.block_m) == (None, 128, 256)
    assert sweep.altered(inner, ("num_stages", -1)) == inner, "there is no pipeline of no stage"


TOOL = """#!/bin/sh
tool=$2; shift 4
"$@"
[ $tool = memcheck ] && echo "========= ERROR SUMMARY: 0 errors" && exit 0
echo "========= Error: Race reported"
echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
"""


def test_the_sanitizer_is_read(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    memory, races = sanitizer.run(Setting("cpu", dry_run=True))
    assert (memory["tool"], memory["passed"], memory["errors"]) == ("memcheck", True, 0), memory
    assert (races["tool"], races["passed"], races["errors"]) == ("racecheck", False, 2), races
    assert "========= Error: Race reported" in races["said"]
    assert memory["raised"] == [] and {name.split()[1] for name in memory["kernels"]} == {"cpu"}


def test_a_sanitizer_that_takes_too_long_is_cut(tmp_path):
    said = (tmp_path / "said").open("w+")
    said.write("ran linear triton bfloat16\n")
    said.flush()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    row = sanitizer.ended((process, said), Setting("cpu", True, deadline=time.monotonic()), time.monotonic())
    assert row["cut"] and row["kernels"] == ["linear triton bfloat16"] and "passed" not in row


def test_nvidia_smi_is_asked_for_words(monkeypatch):
    said = subprocess.CompletedProcess([], 0, "1980 MHz, 40\n", "")
    monkeypatch.setattr(card, "names", lambda place: ["GPU-1", "0"])
    monkeypatch.setattr(card.subprocess, "run", lambda *a, **k: said)
    gpu = torch.device("cuda", 0)
    assert card.asked(("clocks.sm", "temperature.gpu"), gpu) == {"clocks.sm": "1980 MHz", "temperature.gpu": "40"}
    assert "ended with 0: 1980 MHz, 40" in card.asked(("clocks.sm",), gpu)["note"]

    def missing(*a, **k):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(card.subprocess, "run", missing)
    assert "cannot be asked" in card.asked(("clocks.sm",), gpu)["note"]
    by_index = [subprocess.CompletedProcess([], 6, "No devices were found", ""), said]
    monkeypatch.setattr(card.subprocess, "run", lambda *a, **k: by_index.pop(0))
    assert card.asked(("clocks.sm", "temperature.gpu"), gpu)["clocks.sm"] == "1980 MHz"


class FakeEvent:
    """An event whose clock is the number of calls so far, in milliseconds."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = len(self.log)

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_gpu_samples_are_between_events_behind_flushes(monkeypatch):
    """No GPU is here: what is recorded around what, and in which order."""
    log = FakeEvent.log
    log.clear()
    buffer = type("Buffer", (), {"zero_": lambda self: log.append("flush")})()
    monkeypatch.setattr(timer, "cache_buffer", lambda place: buffer)
    monkeypatch.setattr(timer.torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(timer.torch.cuda, "synchronize", lambda place: log.append("wait"))
    setting = Setting("cpu", dry_run=True)
    found = timer.on_cuda(setting, {"a": lambda: log.append("a"), "b": lambda: log.append("b")})
    rounds = len(found["a"].seconds)
    assert rounds == len(found["b"].seconds) == 10
    assert found["a"].seconds == [1e-3] * rounds, "one call between its events, and no flush"
    assert found["a"].host is not None
    timed_log = [word for word in log[log.index("flush") :] if word != "flush"]
    assert timed_log == ["a", "b", "wait"] * rounds


def test_the_cache_buffer_can_be_written_in_every_part(monkeypatch):
    """Also if the first part that needs it runs in inference mode."""
    properties = type("Properties", (), {"L2_cache_size": 2**27})
    monkeypatch.setattr(timer.torch.cuda, "get_device_properties", lambda place: properties)
    with torch.inference_mode():
        buffer = timer.cache_buffer.__wrapped__(torch.device("cpu"))
    assert buffer.nbytes == 2**29
    buffer[:1].zero_()


def test_variants_change_what_they_say():
    call = call_of("attention")
    by_name = dict(rivals.variants(call))
    assert set(by_name) == {"order, classes", "keep bits", "order, classes, keep bits"}
    names = stock.OPS["attention"].arguments()
    both = dict(zip(names, by_name["order, classes, keep bits"].arguments, strict=True))
    assert both["p"] == rivals.P and both["keep_bits"] is not None
    assert sum(both["classes"]) == len(both["order"]) == 16
    alone = dict(rivals.variants(call_of("feed_forward_backward")))["dx alone"]
    assert alone.arguments[-1] == [True, False, False, False, False]
    assert alone.flops * 2 == call_of("feed_forward_backward").flops
    for name, other in by_name.items():
        with ops.use_backend("torch"):
            got, lse = other.run()
        assert got.shape == call.arguments[0][:, 0].shape and lse.isfinite().all(), name


def test_varlen_attention_is_not_compared_at_another_scale():
    with pytest.raises(ValueError, match="varlen_attn scales by"):
        rivals.varlen(torch.ones(2, 3, 1, 16), torch.tensor([0, 2]).int(), 2, 1.0, None)


def test_a_case_that_raises_takes_no_other_with_it(tmp_path, monkeypatch):
    def no_memory(setting, case, name, call):
        if call.op == "linear":
            raise torch.OutOfMemoryError("nothing left")
        yield {"op": call.op}

    monkeypatch.setattr(op_times, "timed_op", no_memory)
    assert dry_run(tmp_path, "ops") == 0
    *rows, end = lines(tmp_path)
    failed = [row for row in rows if "error" in row]
    assert [(row["op"], row["error"]) for row in failed] == [("linear", "OutOfMemoryError: nothing left")] * 2
    assert len(rows) == 2 * len(ops.ALL) and (end["done"], end["errors"]) == (True, 2)
    monkeypatch.setattr(Setting, "is_lost", property(lambda self: True))
    with pytest.raises(DeviceLost, match="after linear"):
        list(op_times.run(Setting("cpu", dry_run=True)))


def test_a_model_that_raises_takes_no_other_with_it(monkeypatch):
    def no_memory(setting, known, case, dtype, anchored):
        if dtype == "fp32" and not anchored:
            raise torch.OutOfMemoryError("nothing left")
        yield {"case": case.name}

    monkeypatch.setattr(models, "timed_model", no_memory)
    first, *rows = models.run(Setting("cpu", dry_run=True))
    assert (first["error"], rows) == ("OutOfMemoryError: nothing left", [{"case": "tiny"}] * 2)


def test_models_without_time_are_cut():
    setting = Setting("cpu", dry_run=True, deadline=time.monotonic() - 1)
    assert {row["cut"] for row in models.run(setting)} == {"the part's time is over"}
    assert [row["cut"] for row in op_times.run(setting)] == ["the part's time is over"]


def call_of(op, case=cases.TINY_CASES[0], dtype=torch.float32):
    return cases.op_calls(case, dtype, "cpu")[op]()


@pytest.mark.parametrize("op", stock.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verdict_passes_what_is_right(op, dtype):
    passed, words = stock.verdict(call_of(op, dtype=dtype), "torch")
    assert passed, words


@pytest.mark.parametrize(
    ("op", "output"),
    [("attention", "out"), ("attention", "lse"), ("add_layer_norm", "y"), ("add_layer_norm", "mean"),
     ("add_layer_norm", "rstd"), ("linear", "y"), ("unpad", "indices"), ("unpad", "cu_seqlens"), ("unpad", "order"),
     ("dropout_bits", "bits"), ("pad_backward", "x"),
     *(("attention_backward", f"{name}_grad") for name in ("qkv", "bias")),
     *(("linear_backward", f"{name}_grad") for name in ("x", "weight", "bias")),
     *(("add_layer_norm_backward", f"{name}_grad") for name in ("x", "bias", "residual", "gamma", "beta"))],
)  # fmt: skip
def test_verdict_judges_every_output(op, output, monkeypatch):
    op = stock.OPS[op]
    backend = op.backends["torch"]

    def wrong(*arguments):
        found = list(stock.outputs(backend.run(*arguments)))
        place = op.returns().index(output)
        found[place] = found[place] + (0.01 if found[place].is_floating_point() else 1)
        return tuple(found) if len(found) > 1 else found[0]

    monkeypatch.setitem(op.backends, "torch", dataclasses.replace(backend, run=wrong))
    passed, words = stock.verdict(call_of(op.name), "torch")
    assert not passed
    assert words.startswith(output)


def test_says_so_without_a_cuda_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_record.main(["--out", str(tmp_path), "--dry-run", "--only", "provenance"]) == 0
    assert "torch sees no CUDA device: recording the CPU" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        gpu_record.main(["--out", str(tmp_path), "--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_dry_run_needs_no_folder_and_a_record_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert gpu_record.main(["--dry-run", "--device", "cpu", "--only", "provenance"]) == 0
    (file,) = tmp_path.glob("gpu_record-*/record.jsonl")
    assert str(file) in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        gpu_record.main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "--out DIR is needed" in capsys.readouterr().err


def test_unknown_part_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_record.main(["--out", str(tmp_path), "--only", "nonsense"])
    assert "there are: provenance" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dry_run(tmp_path, "provenance", "--without", "attention cublas")
    assert "no kernel is called attention cublas" in capsys.readouterr().err


@pytest.mark.parametrize("op", [op for op in stock.ALL if op != "dropout_bits"])  # stock draws other bits
def test_stock_forms_are_the_ops(op):
    call = cases.op_calls(cases.TINY_CASES[0], torch.float64, "cpu")[op]()
    with ops.use_backend("reference"):
        expected = call.run()
    got = stock.ALL[op](*stock.plain(call.arguments))
    every = stock.EVERY_OUTPUT[op](*stock.plain(call.arguments))
    for g, e in zip(stock.outputs(every), stock.outputs(expected), strict=True):
        torch.testing.assert_close(g, e)
    assert torch.equal(stock.outputs(got)[0], stock.outputs(every)[0])  # what is timed is what is judged


@pytest.mark.parametrize("op", [op.name for op in ops.BACKWARD])
def test_stock_gradients_are_the_backwards(op):
    call = call_of(op, dtype=torch.float64)
    with ops.use_backend("reference"):
        expected = stock.outputs(call.run())
    for got, e in zip(stock.prepared(call)(), expected, strict=True):
        torch.testing.assert_close(got, e)


def test_costs_of_a_layers_ops_add_up_to_the_encoders():
    case = cases.CPU_CASES[3]
    calls = cases.op_calls(case, torch.bfloat16, "cpu")
    flops = {op: calls[op]().flops for op in ("linear", "attention", "feed_forward")}
    out_projection = flops["linear"] // 3
    layer = limits.encoder_flops(limits.Dimensions(1, case.hidden, 4 * case.hidden), case.lengths)
    assert sum(flops.values()) + out_projection == layer


def test_every_case_says_why():
    for case in (*cases.CPU_CASES, *cases.CUDA_MODEL_CASES, *cases.CUDA_CASES, *cases.TINY_CASES):
        assert case.why
        assert sum(case.lengths)
    for checked in (checked for group in cases.CHECKED.values() for checked in group):
        assert checked.why and checked.dtypes


def test_cases_cover_what_a_record_must_hold():
    batches = {(case.layers, len(case.lengths)) for case, _ in cases.model_cases("cuda")}
    assert {(12, 1), (12, 8), (12, 64), (12, 256), (24, 1), (24, 64)} <= batches
    assert {dtype for _, dtype in cases.op_cases("cuda")} == {"bf16", "fp16", "fp32"}
    assert {c.sizes.dim for c in cases.CHECKED["cuda"]} == {32, 64, 72}
    batch = cases.batch_of(dataclasses.replace(cases.TINY_CASES[0], times=2), "cpu")
    assert batch.attention_mask.sum(1).tolist() == list(batch.lengths)
    assert len(batch.lengths) == 32
