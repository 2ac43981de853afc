import json
import re

import pytest
import torch
import transformers

import fastbert
from fastbert import bench_model, checkpoint, cli, parity_models, report
from fastbert.bench_model import OURS, SORTED, STOCK
from fastbert.models.families import position_limit
from tests.cli.common import FAST, SLOW, planted, run, shorten


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
    assert (found["format"], found["model"], found["title"]) == (1, tiny.name, tiny.name)
    assert str(tiny.parent) not in (tmp_path / "out.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
    progress = [line for line in done.stderr.splitlines() if line]
    assert all(line.endswith(" ...") for line in progress) and len({*progress}) == len(progress)
    assert {f"loading {tiny.name} ...", "parity, bf16 ...", "docstrings, fp32: padding doubled ..."} <= {*progress}
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
        "--quiet",
        "--quick",
        "--json",
        "-",
    ]
    done = run(cli.app, [*arguments, "--plot", str(tmp_path / "p.png")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["workload"] for row in found["rows"]] == ["query-1x16"] * 2  # no sorted row for one batch
    assert "Speed: query-1x16" in done.stderr
    assert " ..." not in done.stderr  # --quiet


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


def test_bench_asks_the_real_parity(tiny, short, tmp_path, monkeypatch):
    planted(monkeypatch)
    arguments = ["bench", str(tiny), "--workload", "query-1x16", "--dtype", "fp32", "--quick"]
    done = run(cli.app, [*arguments, "--plot", str(tmp_path / "p.png")])
    assert done.exit_code == 1, done.output
    assert "over the bound" in done.stdout


def test_counts_are_words():
    assert (report._count(1, "thread"), report._count(2, "thread")) == ("1 thread", "2 threads")


def test_unknown_workload_lists_the_names(tiny):
    done = run(cli.app, ["bench", str(tiny), "--workload", "nonsense"])
    assert done.exit_code == 2
    assert "ragged-16x256" in done.stderr


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


@pytest.mark.parametrize(("family", "limit"), [("bert", 60), ("roberta", 58), ("distilbert", 60)])
def test_the_position_limit_is_where_stock_models_end(family, limit):
    config = transformers.AutoConfig.for_model(family, max_position_embeddings=60, vocab_size=99, num_hidden_layers=1)
    assert position_limit(config) == limit
    model, ids = transformers.AutoModel.from_config(config), torch.full((1, limit + 1), 5)
    model(ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)
