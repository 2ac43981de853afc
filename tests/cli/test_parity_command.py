import dataclasses
import json

import pytest
import torch
import transformers

from fastbert import cli, dtypes, parity_models, report
from tests.cli.common import planted, run
from tests.models import small


def test_parity_command(tiny, tmp_path):
    done = run(cli.app, ["parity", str(tiny), "--dtype", "fp32,bf16", "--json", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["passed"] is True
    assert (found["format"], found["model"], found["device"]) == (1, tiny.name, "cpu")
    assert found["provenance"]["versions"]["torch"] == torch.__version__
    assert str(tiny.parent) not in (tmp_path / "p.json").read_text()
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


def test_parity_command_fails_with_exit_code_1(tiny, monkeypatch):
    planted(monkeypatch)
    done = run(cli.app, ["parity", str(tiny), "--dtype", "fp32"])
    assert done.exit_code == 1, done.output
    assert "FAIL" in done.stdout
    assert "Worst tensor: hidden_states.2" in done.stdout or "Worst tensor: last_hidden_state" in done.stdout


@pytest.mark.parametrize("family", ["bert", "ernie"])
def test_multiple_choice(family, tmp_path, short):
    model = small.stock({"bert": "Bert", "ernie": "Ernie"}[family] + "ForMultipleChoice", family)
    model.save_pretrained(tmp_path)
    done = run(cli.app, ["parity", str(tmp_path), "--dtype", "fp32", "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["dtypes"]["fp32"]["fast"]
    assert {"hidden_states.2", "logits"} <= {row["tensor"] for row in found["rows"]}
    options = ["--workload", "query-1x16", "--dtype", "fp32", "--quick", "--plot", str(tmp_path / "p.png")]
    done = run(cli.app, ["bench", str(tmp_path), *options])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_a_dtype_has_one_name(dtype):
    assert dtypes.dtype_name(dtype) == "bf16"
    with pytest.raises(ValueError, match=r"unknown dtype torch\.int8; there are: fp32, bf16, fp16"):
        dtypes.dtype_name(torch.int8)


def test_progress_is_on_stderr_and_quiet_leaves_it_out(tiny):
    done = run(cli.app, ["parity", str(tiny)])
    assert done.stderr.splitlines() == [f"loading {tiny.name} ...", "parity, fp32 ...", "parity, bf16 ..."]
    assert "..." not in done.stdout
    for flag in ("-q", "--quiet"):
        assert run(cli.app, ["parity", str(tiny), flag]).stderr == ""


def test_progress_counts_every_forward_and_the_judging(tiny):
    told = []
    parity_models.run(str(tiny), ["fp32"], lengths=(100, 50, 3, 2), progress=lambda *step: told.append(step))
    loading, steps = told[:2], told[2:]
    assert loading == [(f"loading {tiny.name}", 0, 1), (f"loading {tiny.name}", 1, 1)]
    assert steps == [("parity, fp32", i, 8) for i in range(9)]  # ours, stock twice in three parts, the judging
