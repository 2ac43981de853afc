import torch
from typer.testing import CliRunner

import fastbert
from fastbert import bench_model
from fastbert.bench import Gate

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


def planted(monkeypatch):
    """Makes the accelerated model wrong: its last LayerNorm has a gain 1.05 times too large."""
    real = fastbert.models.accelerate.accelerate

    def wrong(model, **options):
        with torch.no_grad():
            model.encoder.layer[-1].output.LayerNorm.weight.mul_(1.05)
        return real(model, **options)

    monkeypatch.setattr(fastbert, "accelerate", wrong, raising=False)
