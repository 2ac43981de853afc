import dataclasses
import json

from fastbert import cli, native, ops
from fastbert.ops import samples
from tests.cli.common import run


def test_doctor_command(tmp_path):
    done = run(cli.app, ["doctor", "--json", str(tmp_path / "d.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["provenance"]["machine"]["threads"] >= 1
    assert set(found["native"]) == {"cpu", "cuda"}
    assert found["isa"] == {"cpu": native.isa() if native.load().available else None}
    assert "attention" in found["ops"]
    for by_setting in found["ops"].values():
        assert {"torch", "reference"} <= set(by_setting["cpu fp32"])
        assert by_setting["cpu fp32"]["reference"] == []  # the specification takes every sample call
    for words in ("oneDNN packed linear", "native library, cpu", "vector code", "triton", "attention", "torch: yes"):
        assert words in done.stdout


def test_op_backends_obey_use_backend_and_give_reasons(monkeypatch):
    found = samples.op_backends("cpu")
    assert [*found] == [op.name for op in ops.ALL]
    assert found["pad"] == {"torch": [], "reference": []}
    refusing = dataclasses.replace(ops.pad.backends["torch"], refuse=lambda *call: ["not today"])
    monkeypatch.setitem(ops.pad.backends, "torch", refusing)
    monkeypatch.setattr(ops.pad, "_order", {})
    assert samples.op_backends("cpu")["pad"] == {"torch": ["not today"], "reference": []}
    with ops.use_backend("reference"):
        assert samples.op_backends("cpu")["pad"] == {"reference": []}


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

    parts = ("provenance", "all_devices", "native_library", "instruction_set", "triton", "demo")
    for part in (*parts, "torch_names", "transformers_names", "kernels", "op_backends"):
        with monkeypatch.context() as patch:
            patch.setattr(doctor, part, lambda: 1 / 0)
            done = run(cli.app, ["doctor"])
        assert done.exit_code == 1, (part, done.output)
        assert "ZeroDivisionError" in done.stdout


def test_doctor_exits_1_when_a_kernel_failed_its_check(monkeypatch):
    from fastbert import doctor

    line = {"kernel": "unpad", "backend": "cpu", "dtype": "int64", "card": "a CPU"}
    for state, code in {"failed": 1, "not run": 0}.items():
        monkeypatch.setattr(doctor, "kernels", lambda state=state: [{**line, "state": state, "words": "off by one"}])
        done = run(cli.app, ["doctor"])
        assert done.exit_code == code, done.output
        assert "off by one" in done.stdout


def test_doctor_json_on_stdout_is_all_of_stdout():
    done = run(cli.app, ["doctor", "--json", "-"])
    found = json.loads(done.stdout)
    assert found["format"] == 1
    assert {"provenance", "devices", "native", "triton", "demo", "kernels", "ops"} <= set(found)
    assert "Ops: backends" in done.stderr
