"""The records in the package: made by a command from a whole run, of the sources as they are now."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from setuptools import Distribution

from benchmarks import gpu_record
from benchmarks import proven as command
from fastbert import devices, ops, proven
from tests.build.conftest import ROOT

ON_CPU = [op.name for op in ops.FORWARD if "cpu" in op.backends]
OWN = [(op.name, name) for op in ops.ALL for name in op.backends if name in proven.OWN]


def test_no_record_is_stale():
    """A changed kernel is proven anew or not at all: python -m benchmarks.proven drops what is stale."""
    known = [(record["kernel"], record["backend"]) for record in proven.records()]
    assert set(known) <= set(OWN)
    assert command.current(proven.records()) == [*proven.records()]


def test_every_record_stands_on_its_rows():
    for record in proven.records():
        rows = [json.loads(line) for line in (ROOT / record["measured"]).read_text().splitlines()]
        assert record in command.proofs(rows, record["measured"])


def test_the_readme_says_what_is_proven_where():
    assert command.card_table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kernel", "backend"), OWN)
def test_a_kernel_has_sources(kernel, backend):
    names = [path.name for path in proven.sources(kernel, backend)]
    kernel = kernel.removesuffix("_backward")
    made_of = (kernel,) if backend == "triton" else proven.MADE_OF[backend].get(kernel, (kernel,))
    assert all(any(name.startswith(f"{one}.") for name in names) for one in made_of)
    if backend != "triton":
        assert f"ops_{backend}.cpp" in names


@pytest.mark.parametrize("suffix", ["cpp", "cu"])
def test_every_file_of_the_native_library_counts_for_a_kernel(suffix):
    counted = {path for kernel, backend in OWN for path in proven.sources(kernel, backend)}
    assert set((ROOT / "csrc").rglob(f"*.{suffix}")) <= counted


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout, whose sources may be changed."""
    for path in ("csrc/ops_cpu.cpp", "csrc/unpad.h", "csrc/cpu/unpad.cpp", "csrc/cpu/pad.cpp", "csrc/cuda/unpad.cu",
                 "kernels/attention.py", "kernels/cards.py", "kernels/gelu.py", "fastbert/devices.py"):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("from .cards import Card" if path == "kernels/attention.py" else path)
    monkeypatch.setattr(proven, "PACKAGE", tmp_path / "fastbert")
    proven.digest.cache_clear()
    yield tmp_path
    proven.digest.cache_clear()


KERNELS = [("unpad", "cpu"), ("unpad", "cuda"), ("attention", "triton"), ("attention_backward", "triton")]


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("csrc/ops_cpu.cpp", [True, True, False, False]),
        ("csrc/unpad.h", [True, True, False, False]),
        ("csrc/cpu/unpad.cpp", [True, False, False, False]),
        ("csrc/cpu/pad.cpp", [False, False, False, False]),
        ("csrc/cuda/unpad.cu", [False, True, False, False]),
        ("kernels/attention.py", [False, False, True, True]),
        ("kernels/cards.py", [False, False, True, True]),
        ("kernels/gelu.py", [False, False, False, False]),
        ("fastbert/devices.py", [False, False, False, False]),
    ],
)
def test_the_digest_is_of_the_kernels_sources(path, changes, checkout):
    before = [proven.digest(*kernel) for kernel in KERNELS]
    assert all(before)
    (checkout / path).write_text("changed")
    proven.digest.cache_clear()
    assert [proven.digest(*kernel) != old for kernel, old in zip(KERNELS, before, strict=True)] == changes


@pytest.fixture
def built(checkout):
    """Writes what setup.py told of the library in the checkout, if it did."""

    def write(text):
        (checkout / "fastbert/_native.json").write_text(text)
        proven.built_sources.cache_clear()

    proven.built_sources.cache_clear()
    yield write
    proven.built_sources.cache_clear()


@pytest.mark.parametrize("kernel", ["unpad", "unpad_backward"])
def test_a_record_holds_for_what_was_built(kernel, checkout, built):
    """Whatever stands in csrc now, and where there is no csrc."""
    record = proven.Record(kernel=kernel, backend="cpu", sources=proven.digest(kernel, "cpu"))
    built(json.dumps({"sources": {"unpad cpu": record["sources"], "unpad cuda": "of another backend"}}))
    for path in ("csrc/cpu/unpad.cpp", "csrc/ops_cpu.cpp"):
        (checkout / path).unlink()
        proven.digest.cache_clear()
        assert proven.digest(kernel, "cpu") != record["sources"]
        assert not proven.is_stale(record)
    built(json.dumps({"sources": {"unpad cpu": "other sources"}}))
    assert proven.is_stale(record)


@pytest.mark.parametrize(
    "text",
    [
        None, "", "1", "[]", '{"library": "", "cuda": ""}', '{"sources": null}', '{"sources": ["unpad cpu"]}',
        '{"sources": {}}', '{"sources": {"unpad cpu": ""}}', '{"sources": {"unpad cpu": null}}',
    ],
    ids=str,
)  # fmt: skip
def test_no_record_holds_where_nobody_knows_what_was_built(text, checkout, built):
    """As of a library built before this was written."""
    if text is not None:
        built(text)
    for sources in (proven.digest("unpad", "cpu"), ""):
        assert proven.is_stale(proven.Record(kernel="unpad", backend="cpu", sources=sources))


def test_the_build_says_what_it_was_made_of(setup_py, tmp_path, monkeypatch):
    """By a file that needs no torch, which pip's isolated builds do not have."""
    extension = setup_py.Extension("fastbert._native", [])
    build = setup_py.BuildNative(Distribution({"name": "fastbert", "ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(tmp_path)
    build.ensure_finalized()
    monkeypatch.setattr(setup_py, "build_library", lambda target, work: {"library": "", "cuda": "no nvcc"})
    build.build_extension(extension)
    compiled = {proven.built_name(*kernel): proven.digest(*kernel) for kernel in OWN if kernel[1] != "triton"}
    built = json.loads((tmp_path / "fastbert/_native.json").read_text())
    assert built == {"library": "", "cuda": "no nvcc", "sources": compiled}
    alone = [sys.executable, "-IS", "-c", "import runpy; runpy.run_path('fastbert/proven.py')"]
    subprocess.run(alone, cwd=ROOT, check=True)


@pytest.mark.usefixtures("_library")
def test_the_built_library_says_what_it_was_made_of():
    assert proven.running("unpad", "cpu") == proven.built_sources()["unpad cpu"] != ""
    assert proven.running("attention", "triton") == proven.digest("attention", "triton")


def test_in_a_wheel_triton_kernels_lie_in_the_package(checkout):
    before = proven.digest("attention", "triton")
    inside = shutil.copytree(checkout / "kernels", checkout / "fastbert/kernels")
    assert proven.sources("attention", "triton") == [inside / "attention.py", inside / "cards.py"]
    proven.digest.cache_clear()
    assert proven.digest("attention", "triton") == before


# the command


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A record of tiny sizes that calls itself whole; of our kernels unpad alone is in it."""
    folder = tmp_path_factory.mktemp("record")
    arguments = ["--out", str(folder), "--device", "cpu", "--dry-run", "--only", "provenance,parity"]
    assert gpu_record.main(arguments) == 0
    found = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    found[0]["dry_run"] = False
    own = [row for row in found if row["part"] == "parity" and row.get("backend") in proven.OWN]
    return [row for row in found if row not in own or row["op"] == "unpad"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Runs the command on rows; what then stands in the package's file."""
    monkeypatch.setattr(proven, "RECORDS", tmp_path / "proven.json")
    proven.records.cache_clear()

    def run(rows):
        (tmp_path / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = command.main([str(tmp_path / "record.jsonl")])
        return code, list(proven.records())

    yield run
    proven.records.cache_clear()


@pytest.fixture
def _library():
    if reasons := ops.unpad.backends["cpu"].reasons(torch.ones(1, 1)):
        pytest.skip("; ".join(reasons))


def of_unpad(rows, **changes):
    return [{**row, **changes} if row.get("op") == "unpad" and row.get("backend") == "cpu" else row for row in rows]


@pytest.mark.usefixtures("_library")
def test_a_record_becomes_a_proof(rows, written, capsys):
    code, (record,) = written(rows)
    assert code == 0
    assert (record["kernel"], record["backend"], record["dtypes"]) == ("unpad", "cpu", ["int64"])
    assert record["card"] == devices.card(torch.device("cpu"))
    assert record["sources"] == proven.digest("unpad", "cpu")
    assert record["commit"].startswith((rows[0]["git"] or {"commit": "unknown"})["commit"])
    assert record["date"] == rows[0]["date"]
    assert f"| CPU | unpad: int64; {record['card']} | {', '.join(ON_CPU[1:])} |" in capsys.readouterr().out
    assert proven.record_of("unpad", "cpu", "int64", record["card"]) == record
    assert proven.record_of("unpad", "cpu", "bool", record["card"]) is None
    assert written(rows) == (0, [record]), "the same again changes nothing"


@pytest.mark.usefixtures("_library")
def test_a_failure_proves_nothing_and_takes_the_old_proof_away(rows, written):
    assert len(written(rows)[1]) == 1
    once = [dict(row) for row in rows]
    next(row for row in once if row.get("op") == "unpad" and row.get("backend") == "cpu")["passed"] = False
    assert written(once) == (0, [])


@pytest.mark.usefixtures("_library")
def test_a_record_of_other_sources_proves_nothing(rows, written):
    older = [{**row, "sources": dict.fromkeys(row["sources"], "older")} if "sources" in row else row for row in rows]
    assert written(older) == (0, [])
    now = written(rows)
    assert len(now[1]) == 1
    assert written(older) == now, "nor does it take the present proof away"


@pytest.mark.usefixtures("_library")
def test_other_cards_keep_their_proofs(rows, written):
    (first,) = written(rows)[1]
    elsewhere = [{**row, "card": "another CPU"} if "card" in row else row for row in rows]
    assert written(elsewhere)[1] == [{**first, "card": "another CPU", "measured": first["measured"]}, first]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [{**rows[0], "dry_run": True}, *rows[1:]], "is of a dry run, which proves nothing"),
        (lambda rows: rows[:-1], "needs one whole run of the parts provenance and parity"),
        (lambda rows: [*rows[:-1], {**rows[-1], "done": False}], "needs one whole run"),
        (lambda rows: rows + rows, "needs one whole run"),
        (lambda rows: [], "needs one whole run"),
    ],
    ids=["dry", "cut", "broken", "twice", "empty"],
)
def test_what_is_no_whole_run_is_refused(change, words, rows, written, capsys):
    assert written(change(rows)) == (1, [])
    assert words in capsys.readouterr().err


def test_the_table_has_every_card(monkeypatch, setup_py):
    monkeypatch.setattr(proven, "records", lambda: (proven.Record(
        kernel="unpad", backend="cuda", card="NVIDIA H200 (sm_90)", dtypes=["int64"],
        sources=proven.digest("unpad", "cuda"), commit="", date="", measured="",
    ),))  # fmt: skip
    lines = command.card_table().splitlines()
    cards = [card for line in lines[2:] for card in line.split("|")[1].strip().split(", ")]
    assert sorted(cards) == sorted(["CPU", *(f"sm_{arch.rstrip('a')}" for arch in setup_py.CUDA_ARCHS)])
    triton = ", ".join(f"{op.name} (triton)" for op in ops.FORWARD if "triton" in op.backends)
    others = ", ".join(f"{op.name} (cuda)" for op in ops.FORWARD if "cuda" in op.backends and op is not ops.unpad)
    assert f"| CPU | nothing | {', '.join(ON_CPU)} |" in lines
    older = others.replace("attention (cuda), ", "")
    assert f"| sm_75 | nothing | unpad (cuda), {older} |" in lines, "attention and Triton's kernels need sm_80"
    assert f"| sm_80, sm_86, sm_89, sm_100, sm_120 | nothing | {triton}, unpad (cuda), {others} |" in lines
    assert f"| sm_90 | unpad (cuda): int64; NVIDIA H200 (sm_90) | {triton}, {others} |" in lines


def test_the_oldest_card_of_triton():
    cards = (ROOT / "kernels/cards.py").read_text()
    assert f"\nOLDEST = {command.OLDEST_OF_TRITON} " in cards
