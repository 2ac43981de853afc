"""What all commands share: help, exit codes, errors in words, terminals of every kind."""

import importlib
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading

import pytest
import torch
from rich.table import Table

from fastbert import checkpoint, cli, doctor
from fastbert.dtypes import DTYPES
from tests.cli.common import run

COMMANDS = ("bench", "parity", "doctor")


@pytest.fixture
def broken(monkeypatch):
    """Makes the doctor raise what it is given."""

    def plant(error):
        def examine():
            raise error

        monkeypatch.setattr(doctor, "examine", examine)

    return plant


@pytest.mark.parametrize("command", ["bench", "parity"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "there is no folder /no/such/folder"),
        (["--dtype", "fp64"], "unknown dtype fp64; there are: fp32, bf16, fp16"),
        (["--dtype", ","], "unknown dtype (none)"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--device", "gpu"], "unknown device gpu; there are: auto, cpu, cuda"),
        (["--device", "cuda:x"], "unknown device cuda:x"),
        (["--device", "cpu:1"], "unknown device cpu:1: the CPU is cpu"),
        (["--nonsense"], "No such option"),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
        (["--json", "/"], "--json: / is a folder; name a file in it"),
    ],
    ids=["folder", "dtype", "no-dtype", "no-card", "device", "card", "cpu", "option", "no-folder", "folder-as-file"],
)
def test_usage_errors_exit_2_in_words(command, arguments, words, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(checkpoint, "load_model", None)  # all are seen before the long work
    model = [] if arguments[0].startswith("/") else [str(tiny)]
    done = run(cli.app, [command, *model, *arguments])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_files_that_cannot_be_written_are_refused_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for command in (["doctor"], ["parity", str(tiny)], ["bench", str(tiny)]):
        done = run(cli.app, [*command, "--json", str(tmp_path / "x.json")])
        assert done.exit_code == 2
        words = "".join(done.stderr.replace("│", "").split())  # a long path is broken at any letter
        assert "x.jsoncannotbewritten" in words
    done = run(cli.app, ["bench", str(tiny), "--plot", "/no/such/folder/p.png"])
    assert "--plot: there is no folder /no/such/folder" in " ".join(done.stderr.replace("│", " ").split())


def test_a_full_disk_at_the_end_is_told(monkeypatch):
    done = run(cli.app, ["doctor", "--json", "/dev/full"])
    assert done.exit_code == 3
    assert "OSError: [Errno 28] No space left on device" in done.stderr


def test_a_device_that_does_not_compute_in_a_dtype(tiny, monkeypatch):
    stock = torch.ones

    def ones(*shape, dtype, device):
        if dtype == torch.float16:
            raise RuntimeError("no kernel image is available")
        return stock(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    done = run(cli.app, ["parity", str(tiny), "--dtype", "fp32,fp16"])
    assert done.exit_code == 2
    words = " ".join(done.stderr.replace("│", " ").split())
    assert "torch does not compute in fp16 on cpu: no kernel image is available" in words


def test_with_json_on_stdout_an_error_leaves_stdout_empty(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("parity", "bench"):
        done = run(cli.app, [command, str(tmp_path / "empty"), "--json", "-"])
        assert (done.exit_code, done.stdout) == (2, "")
        assert "is an empty folder" in done.stderr


def test_unforeseen_errors_are_words_or_with_debug_a_traceback(broken):
    broken(RuntimeError("the [moon]\nfell"))
    done = run(cli.app, ["doctor"])
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == "fastbert: RuntimeError: the [moon] fell\nfastbert: --debug shows where\n"
    debug = run(cli.app, ["doctor", "--debug"])
    assert (debug.exit_code, debug.stdout) == (3, "")
    assert "in examine" in debug.stderr and debug.stderr.endswith("fastbert: RuntimeError: the [moon] fell\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_says_what_needs_less(error, tiny, monkeypatch):
    def load_model(*args, **options):
        raise error

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    done = run(cli.app, ["parity", str(tiny)])
    assert (done.exit_code, done.stdout) == (3, "")
    assert "fastbert: out of memory: one --dtype at a time or a smaller workload needs less" in done.stderr


def test_memory_that_ends_while_a_model_is_loaded_is_no_bad_checkpoint(tiny, monkeypatch):
    def from_pretrained(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    done = run(cli.app, ["parity", str(tiny)])
    assert done.exit_code == 3
    assert "out of memory" in done.stderr


def test_ctrl_c_exits_130_without_a_traceback(broken):
    broken(KeyboardInterrupt())
    for options in ([], ["--debug"]):
        done = run(cli.app, ["doctor", *options])
        assert (done.exit_code, done.stdout, done.stderr) == (130, "", "fastbert: interrupted\n")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_package_that_cannot_be_imported_is_named(package, tiny, monkeypatch):
    stock = importlib.import_module

    def import_module(name, *args):
        if name == package:
            raise ImportError("libcudart.so.99 is not there")
        return stock(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    done = run(cli.app, ["parity", str(tiny)])
    assert (done.exit_code, done.stdout) == (3, "")
    words = " ".join(done.stderr.split())
    assert words == f"fastbert: {package} cannot be imported: ImportError: libcudart.so.99 is not there. Reinstall it"


def test_what_models_are_made_of_cannot_be_imported(tiny, tmp_path):
    """transformers loads that late, within from_pretrained: no fault of the checkpoint."""
    (tmp_path / "triton.py").write_text("raise OSError('libcuda.so.1 is not there')")
    command = [sys.executable, "-m", "fastbert", "parity", str(tiny), "--quiet"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (3, "")
    words = " ".join(done.stderr.split())
    assert words == "fastbert: transformers cannot be imported: OSError: libcuda.so.1 is not there. Reinstall it"


@pytest.mark.slow
def test_the_doctor_lives_through_a_broken_transformers(tmp_path):
    (tmp_path / "transformers.py").write_text("raise RuntimeError('half an installation')")
    command = [sys.executable, "-m", "fastbert", "doctor", "--json", "-"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "half an installation" in json.loads(done.stdout)["private names of transformers"]["error"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [[], ["--json", "-"]], ids=["table", "json"])
def test_a_reader_that_goes_away_ends_the_program_in_silence(options, monkeypatch, capsys):
    """`fastbert doctor | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w")) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "argv", ["fastbert", "doctor", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        stdout.write("what Python flushes at the end")
    assert stopped.value.code == 141
    assert "Traceback" not in capsys.readouterr().err


def test_help_to_a_reader_that_goes_away():
    command = [sys.executable, "-m", "fastbert", "parity", "--help"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    assert program.stderr.read() == ""
    program.stderr.close()
    program.wait(timeout=60)


def examples(*command):
    """The command lines at the end of a --help, without their comments."""
    text = run(cli.app, [*command, "--help"]).stdout
    found = [line.partition("#")[0].strip() for line in text.splitlines() if line.strip().startswith("fastbert ")]
    assert found and all(line.split()[1] in COMMANDS for line in found)
    return found


def test_the_examples_of_the_program_are_among_those_of_its_commands():
    assert {*examples()} < {line for command in COMMANDS for line in examples(command)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_help_run(command, tiny, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-bert").symlink_to(tiny)
    monkeypatch.setattr(checkpoint, "demo_folder", lambda: tiny)
    monkeypatch.setattr("fastbert.bench_model.TEXTS", 24)
    for line in examples(command):
        line, _, target = line.partition(">")
        done = run(cli.app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)
        if target:
            assert target.strip() == "parity.json"
            assert json.loads(done.stdout)["passed"] is True
            assert done.stderr.count("Parity with HuggingFace") == 1  # and no progress: --quiet


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=lambda c: " ".join(c) or "program")
def test_help_names_the_exit_codes_and_needs_no_torch(command):
    program = (
        "import sys\nfrom fastbert.cli import main\n"
        f"sys.argv = ['fastbert', *{command}, '-h']\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'safetensors'} & {*sys.modules}, 'slow'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    codes = " ".join(done.stdout.split())
    for words in ("Examples:", "Exit codes: 0 ", " 1 ", " 2 usage", " 3 anything else, 130 Ctrl-C."):
        assert words in codes


def test_version_and_no_arguments():
    for flag in ("--version", "-V"):
        done = run(cli.app, [flag])
        assert (done.exit_code, done.stdout) == (0, f"fastbert {cli.fastbert.__version__}\n")
    assert "parity" in run(cli.app, []).output


def test_main_is_the_console_entry(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fastbert", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert {*COMMANDS} <= set(capsys.readouterr().out.split())


def test_the_dtypes_by_name_are_those_there_are():
    assert tuple(DTYPES) == cli.DTYPE_NAMES


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_few_letters(encoding, monkeypatch):
    """LANG=C, PYTHONIOENCODING=ascii, a Windows console."""
    from fastbert import native

    monkeypatch.setattr(native, "refuse", lambda device: ["needs 2×4 ‖γ‖ 中"])
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr("sys.argv", ["fastbert", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    sys.stdout.flush()
    expected = "needs 2×4 ‖γ‖ 中".encode(encoding, errors="replace").decode(encoding)
    assert expected in raw.getvalue().decode(encoding)


def on_a_terminal(monkeypatch, columns, arguments, **environment):
    """(exit code, stdout, stderr) of the program whose stdout and stderr are terminals."""
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    texts, readers = {}, []
    for stream in ("stdout", "stderr"):
        leader, follower = pty.openpty()
        opened = io.TextIOWrapper(io.FileIO(follower, "w"), encoding="utf-8")
        monkeypatch.setattr(sys, stream, opened)

        def drain(leader=leader, stream=stream):
            pieces = []
            try:
                while piece := os.read(leader, 65536):
                    pieces.append(piece)
            except OSError:  # the other end was closed
                pass
            texts[stream] = b"".join(pieces).decode().replace("\r\n", "\n")
            os.close(leader)

        readers.append((opened, threading.Thread(target=drain)))
        readers[-1][1].start()
    monkeypatch.setattr(sys, "argv", ["fastbert", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    for opened, reader in readers:
        opened.close()
        reader.join()
    return stopped.value.code, texts["stdout"], texts["stderr"]


@pytest.mark.parametrize(("columns", "form"), [(60, "hidden_states.0: fp32: max 0."), (80, " ─────"), (200, "┏━━━")])
def test_a_narrow_terminal_cuts_no_figure(columns, form, tiny, monkeypatch, tmp_path):
    code, out, progress = on_a_terminal(
        monkeypatch, columns, ["parity", str(tiny), "--json", str(tmp_path / "p.json")], NO_COLOR="1"
    )
    assert code == 0
    assert form in out
    assert "…" not in out and not re.search(r"\x1b\[[39]\d", out)  # neither cut nor colored
    assert max(map(len, re.sub(r"\x1b\[\w+", "", out).splitlines())) <= columns
    for row in json.loads((tmp_path / "p.json").read_text())["rows"]:
        assert f"{row['max_ratio']:.3f}" in out and f"{row['max_error']:.1e}" in out
    assert "parity, bf16" in progress and "10/10" in progress  # a bar, and on stderr
    assert "parity, bf16" not in out


def test_a_table_too_wide_for_any_terminal_becomes_text():
    table = Table("engine", "ms", title="Speed")
    table.add_row("HuggingFace[red]s[/red]", "1.25\n1.5")
    out = cli._Console(width=12, file=io.StringIO())
    cli._show(out, table)
    assert out.file.getvalue() == "Speed\nHuggingFaces\n: ms 1.25, \n1.5\n"


def test_numbers_that_json_has_not_are_null(tmp_path):
    cli._write_json(str(tmp_path / "x.json"), {"a": [float("nan"), float("inf"), 1.5], "b": (True, None, "text")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": [True, None, "text"]}
