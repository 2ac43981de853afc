import contextlib
import json
import os
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import cpu_peers
from benchmarks.peers import OURS, engines, hf, loads, measure, process, rival
from benchmarks.peers.measure import changed
from benchmarks.peers.rival import Rival
from benchmarks.peers.summary import notes, summary, tables
from benchmarks.peers.targets import targets
from fastbert import bench, workloads
from tests.cli.common import planted


def lines(folder):
    return [json.loads(line) for line in (folder / "peers.jsonl").read_text().splitlines()]


def dry_run(folder, *more):
    return cpu_peers.main(["--dry-run", "--out", str(folder), *more])


def of_part(found, part):
    return [line for line in found if line["part"] == part]


def always():
    return ""


HF = Rival("HuggingFace", ("fp32",), hf.available, hf.make)
MINE = engines(dry_run=True)[OURS]


def with_engines(monkeypatch, **rivals):
    monkeypatch.setattr(cpu_peers, "engines", lambda dry_run=False: rivals)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Every engine that is installed, two whole runs."""
    folder = tmp_path_factory.mktemp("peers")
    with pytest.MonkeyPatch.context() as patch:
        absent(patch, "openvino")
        code = dry_run(folder, "--only", "ragged,query,scaling", "--runs", "2")
    return code, lines(folder), folder


def absent(patch, module):
    find = rival.importlib.util.find_spec
    patch.setattr(rival.importlib.util, "find_spec", lambda name, *more: None if name == module else find(name, *more))


def test_a_dry_run_times_every_engine_in_turns(recorded):
    code, found, folder = recorded
    assert code == 0
    rows = of_part(found, "engines")
    for run in (1, 2):
        for workload in ("ragged", "query"):
            here = [row for row in rows if (row["run"], row["workload"]) == (run, workload)]
            timed = {(row["engine"], row["dtype"]) for row in here if not row["reason"]}
            assert {(engine, d) for engine in ("hf", "compile", OURS) for d in ("fp32", "bf16")} <= timed
            assert {len(row["samples"]) for row in here if not row["reason"]} == {2}
    assert (folder / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_rows_say_what_was_measured_where(recorded):
    _, found, _ = recorded
    assert [line["part"] for line in found[:2]] == ["provenance", "peaks"]
    first = found[0]
    assert {"machine", "versions", "git", "load_average", "date"} <= first.keys() and first["dry_run"]
    assert first["machine"]["threads"] == torch.get_num_threads()
    assert {"torch", "onnxruntime", "openvino", "ctranslate2"} <= first["versions"].keys()
    for line in found:
        if line["part"] not in ("summary", "target"):
            assert line["run"] in (1, 2) and line["date"] and "load_average" in line
    for row in of_part(found, "engines"):
        assert {"model", "workload", "engine", "title", "dtype", "reason"} <= row.keys()
        if row["reason"]:
            assert "samples" not in row
            continue
        assert row["seconds"]["median"] == statistics.median(row["samples"])
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / row["seconds"]["median"])
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"])
        assert row["error_against"] == "HuggingFace in float64"
        assert row["relative_error"] < (1e-5 if row["dtype"] == "fp32" else 0.05)
        assert row["real_tokens"] == sum(map(sum, row["lengths"])) == round(row["fill"] * row["padded_tokens"])
        assert row["share_of_peak"] > 0 and row["times_best_peer"]["median"] > 0
    for row in of_part(found, "peaks"):
        assert all(peak["flops_per_second"] == max(peak["rates"].values()) for peak in row["peaks"].values())
        ways = {name.split(" [")[0] for name in row["peaks"]["fp32"]["rates"]}
        assert ways == {"F.linear", "ops.linear packed", "oneDNN packed"}
    mine = [row for row in of_part(found, "engines") if row["engine"] == OURS]
    words = {"int8": "of at most 0.03"}
    assert mine and all(words.get(row["dtype"], "of what parity allows") in row["parity"] for row in mine)
    assert len(of_part(found, "scaling")) == 2 * 3 * 2  # runs, dtypes, checks
    assert all(
        row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] for row in of_part(found, "scaling")
    )


def test_what_is_not_installed_is_said(recorded):
    _, found, _ = recorded
    rows = [row for row in of_part(found, "engines") if row["engine"] == "openvino"]
    assert len(rows) == 2 * 2 * 3  # runs, workloads, dtypes
    assert {row["reason"] for row in rows} == {"not installed: openvino; pip install 'fastbert-kernels[peers]'"}


def test_the_summary_is_the_median_of_the_runs(recorded):
    _, found, _ = recorded
    rows = of_part(found, "summary")
    assert len(rows) == len(of_part(found, "engines")) / 2
    (row,) = (r for r in rows if (r["engine"], r["dtype"], r["workload"]) == (OURS, "fp32", "ragged"))
    runs = [
        line["seconds"]["median"]
        for line in of_part(found, "engines")
        if (line["engine"], line["dtype"], line["workload"]) == (OURS, "fp32", "ragged")
    ]
    assert row["runs"] == 2 and row["seconds"] == statistics.median(runs)
    assert (row["fastest"], row["slowest"]) == (min(runs), max(runs))


def refuse(model, dtype, folder):
    raise ValueError("no such layer\nand more")


def broken_call(model, dtype, folder):
    def run():
        raise RuntimeError("out of cheese")

    return lambda batch: run


def twice(model, dtype, folder):
    bind = hf.make(model, dtype, folder)
    return lambda batch: lambda: 2 * bind(batch)()


def test_an_engine_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    failing = {"refuse": refuse, "broken": broken_call, "twice": twice}
    rivals = {name: Rival(name, ("fp32",), always, make) for name, make in failing.items()}
    with_engines(monkeypatch, hf=HF, **rivals, fastbert=MINE)
    assert dry_run(tmp_path, "--only", "query", "--dtypes", "fp32") == 0
    rows = {row["engine"]: row for row in of_part(lines(tmp_path), "engines")}
    assert rows["refuse"]["reason"] == "ValueError: no such layer"
    assert rows["broken"]["reason"] == "RuntimeError: out of cheese"
    assert rows["twice"]["reason"] == "it computes something else: relative error 1"
    assert not rows["hf"]["reason"] and not rows[OURS]["reason"]
    assert rows[OURS]["best_peer"] == "HuggingFace", "what failed is no peer"
    assert "out of cheese" in capsys.readouterr().out


def tired(model, dtype, folder):
    bind, calls = hf.make(model, dtype, folder), []

    def run(batch):
        calls.append(batch)
        if len(calls) > 2:
            raise RuntimeError("tired")
        return bind(batch)()

    return lambda batch: lambda: run(batch)


def test_an_engine_that_fails_while_it_is_timed_is_a_row(monkeypatch, tmp_path):
    with_engines(monkeypatch, hf=HF, tired=Rival("tired", ("fp32",), always, tired))
    assert dry_run(tmp_path, "--only", "query", "--dtypes", "fp32") == 0
    rows = {row["engine"]: row for row in of_part(lines(tmp_path), "engines")}
    assert rows["tired"]["reason"] == "it failed while it was timed: RuntimeError: tired"
    assert "samples" in rows["hf"] and not rows["hf"]["reason"]


def dies(model, dtype, folder):
    bind = hf.make(model, dtype, folder)
    return lambda batch: lambda: os._exit(7) if batch.input_ids.shape[0] == 1 else bind(batch)()


def test_an_engine_that_ends_its_process_is_a_row(monkeypatch, tmp_path):
    with_engines(monkeypatch, dies=Rival("dies", ("fp32", "bf16"), always, dies), hf=HF)
    assert dry_run(tmp_path, "--only", "ragged,query") == 0
    rows = of_part(lines(tmp_path), "engines")
    reasons = {(row["engine"], row["workload"], row["dtype"]): row["reason"] for row in rows}
    assert reasons["dies", "ragged", "fp32"] == reasons["hf", "ragged", "fp32"] == reasons["hf", "query", "fp32"] == ""
    assert reasons["dies", "query", "fp32"] == reasons["dies", "query", "bf16"] == "its process ended with 7"


def where(model, dtype, folder):
    """An engine that says in which process it runs, with how many threads."""
    bind, file = hf.make(model, dtype, folder), folder / f"{dtype}-{os.getpid()}-{torch.get_num_threads()}"
    file.touch()
    return bind


def test_every_engine_has_a_process_and_this_ones_threads(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    rivals = {name: Rival(name, ("fp32", "bf16"), always, where) for name in ("first", "second")}
    plan = measure.Plan(loads.DRY_MODELS, [], False, rivals, ("fp32", "bf16"), tmp_path, dry_run=True)
    try:
        torch.set_num_threads(3)
        with contextlib.ExitStack() as ending:
            made = measure.made(plan, "tiny", loads.DRY_MODELS["tiny"](), ending)
            alive = [process.process for process in made.values()]
            assert all(process.is_alive() for process in alive)
    finally:
        torch.set_num_threads(threads)
    told = [file.name.split("-") for file in (tmp_path / "tiny").glob("*-*-*")]
    assert sorted(dtype for dtype, _, _ in told) == ["bf16", "bf16", "fp32", "fp32"]
    assert len({pid for _, pid, _ in told} - {str(os.getpid())}) == 2, (
        "a process for each engine, not for each precision"
    )
    assert {count for _, _, count in told} == {"3"}
    assert not any(process.is_alive() for process in alive)


def test_an_engine_that_is_asked_for_nothing_has_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "Process", None)
    plan = measure.Plan(loads.DRY_MODELS, [], False, {"hf": HF}, ("int8",), tmp_path, dry_run=True)
    with contextlib.ExitStack() as ending:
        assert measure.made(plan, "tiny", loads.DRY_MODELS["tiny"](), ending) == {}


def test_without_parity_there_is_no_speed(monkeypatch, tmp_path):
    planted(monkeypatch)
    with_engines(monkeypatch, hf=HF, fastbert=MINE)
    assert dry_run(tmp_path, "--only", "query,scaling", "--dtypes", "fp32") == 1
    found = lines(tmp_path)
    (row,) = (row for row in of_part(found, "engines") if row["engine"] == OURS)
    assert row["reason"].startswith("no speed: parity failed: ") and "samples" not in row
    assert all(row["reason"].startswith("no speed: parity failed") for row in of_part(found, "scaling"))
    assert not any(target["met"] for target in of_part(found, "target"))


def test_a_model_that_is_not_there_is_rows(monkeypatch, tmp_path):
    def gone():
        raise FileNotFoundError("no weights here")

    monkeypatch.setattr(loads, "DRY_MODELS", {"gone": gone, **loads.DRY_MODELS})
    with_engines(monkeypatch, hf=HF, fastbert=MINE)
    assert dry_run(tmp_path, "--only", "query", "--dtypes", "fp32") == 1
    reasons = {(row["model"], row["engine"]): row["reason"] for row in of_part(lines(tmp_path), "engines")}
    assert reasons["gone", "hf"] == reasons["gone", OURS] == "FileNotFoundError: no weights here"
    assert reasons["tiny", "hf"] == reasons["tiny", OURS] == ""


@pytest.mark.parametrize("name", [name for name in engines() if name != OURS])
def test_every_rival_computes_the_model(name, tmp_path):
    """On a batch of another size and length than the one that it was converted with."""
    other = engines(dry_run=True)[name]
    if reason := other.available():
        pytest.skip(reason)
    model = loads.DRY_MODELS["tiny"]()
    load = loads.load("ragged", model, dry_run=True)
    (expected,) = measure.reference(model, load.batches)
    for dtype in other.dtypes:
        try:
            bind = other.make(model, dtype, tmp_path)
        except ValueError as error:
            assert "do not support" in str(error), "CTranslate2 has no bf16 on most CPUs"
            continue
        (batch,) = load.batches
        got = bind(batch)()[batch.attention_mask.bool()].double()
        error = float((got - expected).norm() / expected.norm())
        assert error < {"fp32": 1e-6, "bf16": 0.02, "int8": 0.05}[dtype], dtype


# What is made of the rows


def engine_line(run, engine, samples, dtype="fp32", workload="dense", model="bert-base", reason="", **more):
    line = {"part": "engines", "run": run, "model": model, "workload": workload, "engine": engine, "dtype": dtype}
    line |= {"title": engine.upper(), "reason": reason}
    if not reason:
        median = statistics.median(samples)
        line |= {"samples": samples, "seconds": {"median": median}, "real_tokens": 100, "relative_error": 1e-7}
        line["flops_per_second"] = 9.0 / median
    return line | more


def peaks_line(run, when="before", **rates):
    peaks = {dtype: {"flops_per_second": rate} for dtype, rate in rates.items()}
    return {"part": "peaks", "run": run, "when": when, "peaks": peaks}


def three_runs(ours, peer, **where):
    """Runs whose medians are these; the peaks are 10 FLOP/s before the models of run 1, and more behind them."""
    found = [peaks_line(run, fp32=10.0, bf16=10.0) for run in (1, 2, 3)]
    for run, (mine, theirs) in enumerate(zip(ours, peer, strict=True), 1):
        found += [engine_line(run, OURS, [mine] * 3, **where), engine_line(run, "slow", [9.0] * 3, **where)]
        found += [engine_line(run, "peer", [theirs] * 3, **where)]
    return found


def row_of(found, engine=OURS):
    (row,) = (row for row in summary(found, OURS) if row.engine == engine)
    return row


def test_medians_of_runs_spread_and_the_best_peer():
    row = row_of(three_runs([1.0, 3.0, 2.0], [2.0, 3.0, 8.0]))
    assert (row.runs, row.seconds, row.fastest, row.slowest) == (3, 2.0, 1.0, 3.0)
    assert row.best_peer == "PEER", "its median of medians is 3, the other's 9"
    assert row.times_best_peer == 2.0, "the median of 2, 1 and 4: each run's own ratio"
    assert row.tokens_per_second == 50.0
    assert row.share_of_peak == pytest.approx(9.0 / 2.0 / 10.0)
    assert row_of(three_runs([1.0] * 3, [2.0] * 3), "peer").times_best_peer == 1.0


def test_the_peak_is_the_best_of_the_run():
    found = three_runs([1.0] * 3, [1.0] * 3)
    more = [peaks_line(run, "after", fp32=rate) for run, rate in ((1, 20.0), (2, 5.0), (3, 5.0))]
    assert row_of(found + more).share_of_peak == pytest.approx(0.9), "the median of 0.45, 0.9 and 0.9"


def test_another_precision_is_no_peer():
    found = [*three_runs([1.0] * 3, [2.0] * 3), engine_line(1, "int8er", [0.1] * 3, dtype="int8")]
    assert row_of(found).times_best_peer == 2.0
    assert row_of(found, "int8er").times_best_peer == 1.0


def test_a_run_that_failed_is_said():
    found = three_runs([1.0, 3.0, 2.0], [2.0, 2.0, 2.0])
    found = [line for line in found if (line["run"], line.get("engine")) != (3, OURS)]
    found.append(engine_line(3, OURS, [], reason="no memory"))
    row = row_of(found)
    assert (row.runs, row.seconds, row.note) == (2, 2.0, "ran in 2 of 3 runs: no memory")
    assert notes([row]) == ["FASTBERT fp32: ran in 2 of 3 runs: no memory"]


def test_notes_say_a_reason_once():
    found = [engine_line(1, "gone", [], dtype=d, workload=w, reason="x") for d in ("fp32", "int8") for w in ("a", "b")]
    found.append(engine_line(1, "half", [], workload="a", reason="y"))
    rows = summary(found, OURS)
    assert notes(rows) == ["GONE fp32, int8: x", "HALF fp32 (bert-base a): y"]
    assert [table.row_count for table in tables(rows, OURS)] == [3, 2]


def judged(found, scaling=()):
    return {(t.what, t.met) for t in targets(summary(found, OURS), scaling, OURS)}


def test_speed_targets():
    for workload, bound in (("dense", 1.0), ("ragged", 1.8), ("query", 1.2)):
        what = f"bert-base {workload} fp32: times the best peer (PEER)"
        reached = three_runs([1.0] * 3, [bound] * 3, workload=workload)
        below = three_runs([1.0] * 3, [bound * 0.999] * 3, workload=workload)
        assert (what, True) in judged(reached)
        assert (what, False) in judged(below)
    assert judged(three_runs([1.0] * 3, [0.1] * 3, workload="docstrings")) == set(), "no target stands on docstrings"


def test_share_targets_are_of_bert_base():
    what = "bert-base dense {}: share of the peak of products"
    for dtype, bound in (("fp32", 0.90), ("bf16", 0.85)):
        for factor, met in ((1.0001, True), (0.9999, False)):
            seconds = 9.0 / 10.0 / bound / factor
            assert (what.format(dtype), met) in judged(three_runs([seconds] * 3, [5.0] * 3, dtype=dtype))
    other = judged(three_runs([1.0] * 3, [5.0] * 3, model="minilm"))
    assert not any("share" in what for what, _ in other)
    query = judged(three_runs([1.0] * 3, [5.0] * 3, workload="query"))
    assert not any("share" in what for what, _ in query)


def test_what_was_not_measured_is_not_met():
    alone = [engine_line(1, OURS, [1.0])]
    found = targets(summary(alone, OURS), [], OURS)
    assert [t.met for t in found] == [False, False]
    assert "not measured: no peer of this precision ran" in found[0].words
    assert "not measured: no peak was measured" in found[1].words
    failed = targets(summary([engine_line(1, OURS, [], reason="parity failed")], OURS), [], OURS)
    assert all(not t.met and "parity failed" in t.words for t in failed)


def scaling_line(what, median, low, high, reason=""):
    ratio = {} if reason else {"ratio": {"median": median, "low": low, "high": high}}
    where = {"part": "scaling", "model": "tiny", "workload": "ragged", "dtype": "fp32", "what": what}
    return {**where, "reason": reason, **ratio}


def test_scaling_targets_take_the_median_of_runs_and_the_widest_interval():
    widths = [scaling_line("padding doubled", m, m - 0.01, m + 0.02) for m in (1.02, 1.5, 1.03)]
    tens = [scaling_line("10 x the sequences", 10.31, 10.2, 10.4)]
    wide, ten = targets([], widths + tens, OURS)
    assert wide.met and wide.figure == 1.03 and "1.010-1.520" in wide.what
    assert not ten.met and ten.at_most
    (none,) = targets([], [scaling_line("padding doubled", 0, 0, 0, reason="no positions")], OURS)
    assert not none.met and none.words.endswith("not measured: no positions")


def test_the_interval_of_pairs_holds_the_true_ratio():
    """20 pairs whose ratio is 1.02 but for noise of 1%, on a machine that is up to five times slower at times."""
    generator = torch.Generator().manual_seed(0)
    noise = (0.01 * torch.randn(2, measure.PAIRS, generator=generator)).tolist()
    drift = [1 + 2 * (i % 3) for i in range(measure.PAIRS)]
    own = [d * (1 + n) for d, n in zip(drift, noise[0], strict=True)]
    wide = [1.02 * d * (1 + n) for d, n in zip(drift, noise[1], strict=True)]
    found = measure.ratio(wide, own)
    assert found.low < 1.02 < found.high and found.high - found.low < 0.03
    assert found == measure.ratio(wide, own), "its draws are seeded"
    assert measure.PAIRS >= 20


def test_what_scales_is_the_same_work():
    (batch,) = loads.load("ragged", loads.DRY_MODELS["tiny"](), dry_run=True).batches
    wide, ten = changed(batch, "padding doubled", 512), changed(batch, "10 x the sequences", 512)
    assert wide.input_ids.shape == (16, 2 * batch.input_ids.shape[1]) and wide.lengths == batch.lengths
    assert torch.equal(wide.attention_mask.sum(1), batch.attention_mask.sum(1))
    assert ten.real_tokens == 10 * batch.real_tokens and ten.input_ids.shape[0] == 160
    assert torch.equal(ten.attention_mask.sum(1), torch.tensor(ten.lengths))
    with pytest.raises(ValueError, match="has 40 positions"):
        changed(batch, "padding doubled", 40)


LENGTHS = (102, 45, 141, 117, 56, 29, 40, 74, 91, 67, 81, 35, 21, 50, 61, 256)


def test_the_ragged_lengths_are_these():
    """Fill 0.31; whoever changes them compares other work with figures of before."""
    lengths = workloads.get(loads.WORKLOADS["ragged"]).rows
    assert lengths == LENGTHS
    assert sum(lengths) / (16 * 256) == pytest.approx(0.31, abs=0.005)
    assert workloads.get(loads.WORKLOADS["dense"]).rows == (128,) * 8
    assert workloads.get(loads.WORKLOADS["query"]).rows == (16,)


def rows_of(batches):
    return {tuple(row[:n].tolist()) for batch in batches for row, n in zip(batch.input_ids, batch.lengths, strict=True)}


def test_docstrings_are_64_and_others_calibrate(monkeypatch, docstrings):
    load = workloads.WORKLOADS["docstrings"]
    monkeypatch.setitem(workloads.WORKLOADS, "docstrings", replace(load, texts=lambda: docstrings))
    model = loads.random_model(loads.BASE, 0, torch.float32, "cpu")
    timed = loads.load("docstrings", model)
    assert timed.texts == 64 and len(timed.batches) == 2
    others = loads.calibration(model)
    assert len(others) == 32 and all(batch.padded_tokens == batch.real_tokens for batch in others)
    assert rows_of(timed.batches).isdisjoint(rows_of(others))
    assert all(max(batch.lengths) <= model.config.max_position_embeddings for batch in (*timed.batches, *others))


# Rounds


def test_every_round_has_its_own_order():
    calls = []
    samplers = {name: (lambda name=name: calls.append(name) or float(len(calls))) for name in "ABCDE"}
    run = partial(bench.in_turns, samplers, 6, seed=3)
    found = run()
    rounds = [calls[i : i + 5] for i in range(0, 30, 5)]
    assert found["C"] == [i + 1.0 for i, name in enumerate(calls) if name == "C"]
    assert all(sorted(names) == list("ABCDE") for names in rounds), "each candidate once a round"
    assert len({tuple(names) for names in rounds}) > 3
    first = list(calls)
    calls.clear()
    run()
    assert calls == first, "the order is seeded"


def test_rest_and_the_call_before_are_not_timed(monkeypatch):
    clock, calls = [0.0], []

    def pass_time(seconds):
        clock[0] += seconds

    monkeypatch.setattr(process.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(process.time, "sleep", lambda seconds: (calls.append("rest"), pass_time(100.0 * seconds)))
    seat = process.Seat(HF, None, None)
    seat.bound["x"] = [lambda: (calls.append("a"), pass_time(1.0)), lambda: (calls.append("b"), pass_time(2.0))]
    assert seat.seconds("x", 0.5, True) == 3.0
    assert calls == ["rest", "a", "b", "a", "b"]
    calls.clear()
    assert seat.seconds("x", 0.0, False) == 3.0
    assert calls == ["rest", "a", "b"]


# The command


def test_a_missed_target_is_an_exit_code_if_asked(monkeypatch, tmp_path, capsys):
    with_engines(monkeypatch, hf=HF, fastbert=MINE)
    arguments = ["--only", "query", "--dtypes", "fp32"]
    for bound, codes in ((1e9, (0, 1)), (0.0, (0, 0))):
        monkeypatch.setitem(cpu_peers.targets.__globals__["SPEED"], "query", bound)
        assert (dry_run(tmp_path, *arguments), dry_run(tmp_path, *arguments, "--check")) == codes
        assert ("missed: tiny query fp32" if bound else "met: tiny query fp32") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick"], "--out DIR is needed"),
        (["--dry-run", "--only", "dense,nothing"], "no workload is called nothing; there are: dense, ragged"),
        (["--dry-run", "--engines", "tensorrt"], "no engine is called tensorrt; there are: hf, compile"),
        (["--dry-run", "--models", "t5"], "no model is called t5"),
        (["--dry-run", "--dtypes", "fp8"], "no dtype is called fp8"),
        (["--dry-run", "--runs", "0"], "--runs must be 1 or more"),
    ],
)
def test_wrong_usage_is_said(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu_peers.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu_peers.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "examples:" in said and "exit codes:" in said


def test_ctrl_c_leaves_what_is_known(monkeypatch, tmp_path, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    with_engines(monkeypatch, hf=HF)
    monkeypatch.setattr(measure, "compared", stop)
    assert dry_run(tmp_path, "--only", "query") == 130
    assert [line["part"] for line in lines(tmp_path)] == ["provenance", "peaks"]
    assert "peers.jsonl" in capsys.readouterr().out
