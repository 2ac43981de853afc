import dataclasses
import json

import pytest
import torch

from benchmarks import cases, gpu_record, stock
from fastbert import limits, ops


def lines(folder):
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    code = gpu_record.main(["--out", str(folder), "--device", "cpu", "--dry-run"])
    return code, lines(folder)


def test_dry_run_does_every_part(recorded):
    code, found = recorded
    assert code == 0
    ends = [row["part"] for row in found if row.get("done")]
    assert ends == list(gpu_record.PARTS)
    first = found[0]
    assert first["part"] == "provenance"
    assert (first["device"], first["dry_run"]) == ("cpu", True)
    assert first["versions"]["torch"] == torch.__version__


def test_dry_run_judges_every_op_and_times_it(recorded):
    _, found = recorded
    judged = {(r["op"], r["backend"]): r["passed"] for r in found if r["part"] == "parity" and "passed" in r}
    timed = {(r["op"], r["backend"]) for r in found if r["part"] == "ops" and "seconds" in r}
    assert {op.name for op in ops.ALL} == {op for op, _ in judged}
    assert all(judged.values())
    assert {(op.name, "torch") for op in ops.ALL} <= timed
    assert {(op.name, "stock") for op in ops.ALL} <= timed
    for row in found:
        if "samples" in row:
            assert len(row["samples"]) == row["seconds"]["count"] == 2


def test_dry_run_compares_models(recorded):
    _, found = recorded
    engines = {(r["engine"], r["dtype"]) for r in found if r["part"] == "models" and "seconds" in r}
    assert engines == {(engine, dtype) for engine in ("huggingface", "fastbert") for dtype in ("fp32", "bf16")}


def test_a_part_that_raises_is_recorded_and_the_next_runs(tmp_path, monkeypatch, capsys):
    def broken(setting):
        yield {"row": 1}
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu_record.PARTS, "ceilings", broken)
    code = gpu_record.main(["--out", str(tmp_path), "--device", "cpu", "--dry-run", "--only", "ceilings,provenance"])
    assert code == 1
    rows = lines(tmp_path)
    assert [row["part"] for row in rows] == ["ceilings", "ceilings", "provenance", "provenance"]
    assert rows[0]["row"] == 1  # what was known before is kept
    assert rows[1]["done"] is False
    assert rows[1]["error"] == "RuntimeError: out of luck"
    assert "broken" in rows[1]["traceback"]
    assert rows[3]["done"] is True
    assert "out of luck" in capsys.readouterr().err


def off(call, backend):
    return False, "off"


def test_a_backend_without_parity_is_not_timed(tmp_path, monkeypatch):
    """Also where the part that reports parity is left out."""
    monkeypatch.setattr(stock, "verdict", off)
    gpu_record.main(["--out", str(tmp_path), "--device", "cpu", "--dry-run", "--only", "ops"])
    found = [row for row in lines(tmp_path) if row["part"] == "ops" and "op" in row]
    assert {row["backend"] for row in found if "seconds" in row} == {"stock"}
    silent = {row["op"] for row in found if row.get("note") == "no speed: parity failed: off"}
    assert silent == set(stock.OPS)


def test_parity_is_asked_once_for_each_call_of_each_case(tmp_path, monkeypatch):
    asked = []
    verdict = stock.verdict

    def counted(call, backend):
        asked.append((call.op, backend, call.arguments[0].shape, call.arguments[-1]))
        return verdict(call, backend)

    monkeypatch.setattr(stock, "verdict", counted)
    monkeypatch.setattr(gpu_record, "TINY_CASES", (cases.TINY_CASES[0], cases.CPU_CASES[0]))
    gpu_record.main(["--out", str(tmp_path), "--device", "cpu", "--dry-run", "--only", "parity,ops"])
    found = [r for r in lines(tmp_path) if r["part"] == "parity" and "passed" in r]
    assert len(asked) == len(found) == len({(r["op"], r["case"], r["dtype"], r["backend"]) for r in found})
    assert {r["case"] for r in found} == {"tiny", "minilm-query"}


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
     ("add_layer_norm", "rstd"), ("linear", "y"), ("unpad", "indices"), ("unpad", "cu_seqlens"),
     ("dropout_bits", "bits"), ("attention_backward", "qkv_grad"), ("pad_backward", "x"),
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
    for case in (*cases.CPU_CASES, *cases.CUDA_CASES, *cases.TINY_CASES):
        assert case.why
        assert sum(case.lengths)
