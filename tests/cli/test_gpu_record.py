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


def test_a_backend_without_parity_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_record, "agree", lambda *a: (False, "off"))
    gpu_record.main(["--out", str(tmp_path), "--device", "cpu", "--dry-run", "--only", "parity,ops"])
    timed = {r["backend"] for r in lines(tmp_path) if r["part"] == "ops" and "seconds" in r}
    assert timed == {"stock"}


def test_agree_sees_a_wrong_number():
    x = torch.randn(64, 64)
    assert gpu_record.agree(x, x.double(), x)[0]
    assert not gpu_record.agree(x * 1.01, x.double(), x)[0]
    ids = torch.arange(4), torch.arange(3)
    assert gpu_record.agree(ids, ids, ids)[0]
    assert not gpu_record.agree((ids[0], ids[1] + 1), ids, ids)[0]


def test_says_so_without_a_cuda_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_record.main(["--out", str(tmp_path), "--dry-run", "--only", "provenance"]) == 0
    assert "torch sees no CUDA device: recording the CPU" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        gpu_record.main(["--out", str(tmp_path), "--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_unknown_part_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_record.main(["--out", str(tmp_path), "--only", "nonsense"])
    assert "there are: provenance" in capsys.readouterr().err


@pytest.mark.parametrize("op", stock.ALL)
def test_stock_forms_are_the_ops(op):
    call = cases.op_calls(cases.TINY_CASES[0], torch.float64, "cpu")[op]()
    with ops.use_backend("reference"):
        expected = call.run()
    got = stock.ALL[op](*stock.plain(call.arguments))
    pairs = zip(got, expected, strict=True) if op == "unpad" else [(got, expected)]
    for g, e in pairs:
        torch.testing.assert_close(g, e if isinstance(e, torch.Tensor) else e[0])


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
