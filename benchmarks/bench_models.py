"""Whole forwards, stock HuggingFace and fastbert, on named workloads; random weights of real sizes.

    pytest benchmarks/bench_models.py --benchmark-group-by=group

The real checkpoint is timed by `fastbert bench`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import fastbert
from benchmarks.cases import Case, cases
from fastbert import workloads
from fastbert.bench_model import forward
from fastbert.limits import Dimensions, encoder_flops, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 4  # a layer repeats: more only takes longer


@pytest.mark.parametrize("engine", ["huggingface", "fastbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases(DEVICE), ids=lambda case: case.name)
def test_model(benchmark: Any, case: Case, dtype: torch.dtype, engine: str) -> None:
    model = random_model(case, LAYERS, dtype, DEVICE)
    if engine == "fastbert":
        model = fastbert.accelerate(copy.deepcopy(model))
    batch = workloads.batches(case.workload, vocab_size=model.config.vocab_size).batches[0].to(DEVICE)

    def run() -> None:
        forward(model, batch)
        synchronize(DEVICE)

    benchmark.group = f"{case.name} {dtype}"
    benchmark(run)
    seconds = benchmark.stats.stats.median if benchmark.stats else None  # None under --benchmark-disable
    if seconds:
        flops = encoder_flops(Dimensions.of(model.config), batch.lengths)
        benchmark.extra_info["GFLOP/s on real tokens"] = round(flops / seconds / 1e9, 1)


def random_model(case: Case, layers: int, dtype: torch.dtype, device: str) -> Any:
    """A BertModel of the case's sizes with seeded random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=layers,
    )
    return BertModel(config, add_pooling_layer=False).eval().to(device, dtype)
