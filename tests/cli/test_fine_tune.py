import json

import pytest

import fastbert
from benchmarks import fine_tune


def run(folder, tmp_path, *arguments):
    """The exit code, and what was written."""
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "curves.png")]
    code = fine_tune.main([*(["--model", str(folder)] if folder else []), *files, *arguments])
    return code, json.loads((tmp_path / "found.json").read_text())


def test_a_record(tiny, tmp_path, capsys):
    code, found = run(tiny, tmp_path, "--steps", "8")
    assert code == 0
    assert found["steps"] == 8 and 0 < found["fill"] < 0.9 and found["provenance"]["versions"]["torch"]
    for dtype, result in zip(("fp32", "bf16"), found["results"], strict=True):
        assert result["dtype"] == dtype and result["fast"] and result["passed"]
        assert {len(curve) for curve in result["losses"].values()} == {8}
        assert len(result["losses"]) == 2 + fine_tune.NOISE_RUNS
        assert {name: len(s) for name, s in result["seconds"].items()} == {fine_tune.STOCK: 8, fine_tune.OURS: 8}
        assert len(set(result["losses"][fine_tune.OURS])) == 8
        assert all(0 < share < 1 for share in result["accuracy"].values())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "bf16" in capsys.readouterr().out


def test_with_dropout_nothing_is_judged(tiny, tmp_path):
    code, found = run(tiny, tmp_path, "--steps", "2", "--dropout", "0.1", "--dtypes", "fp32")
    (result,) = found["results"]
    assert code == 0 and result["fast"] and result["passed"] is None and result["noise"] is None


def wrong_gradient(model):
    """One gradient is off."""
    model.base_model.embeddings.LayerNorm.weight.register_hook(lambda gradient: -gradient)


def stepped_aside(model):
    """HuggingFace's own path: the curves agree, and nothing was shown."""
    model.base_model.encoder.layer[0].register_forward_hook(lambda module, args, output: output)


@pytest.mark.parametrize(("plant", "what"), [(wrong_gradient, "passed"), (stepped_aside, "fast")])
def test_what_is_wrong_is_an_error(plant, what, tiny, tmp_path, monkeypatch):
    accelerate = fastbert.accelerate
    monkeypatch.setattr(fastbert, "accelerate", lambda model: plant(accelerate(model)))
    code, found = run(tiny, tmp_path, "--steps", "4", "--dtypes", "fp32")
    assert code == 1 and not found["results"][0][what]


@pytest.mark.slow
def test_the_real_checkpoint(tmp_path):
    code, found = run(None, tmp_path, "--steps", "8")
    assert code == 0 and all(result["passed"] and result["fast"] for result in found["results"])
