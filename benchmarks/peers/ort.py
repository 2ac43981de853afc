"""ONNX Runtime: fp32, and int8 by its dynamic quantization.

The graph is exported with eager attention by torch.onnx's TorchScript exporter: that is the form in which ONNX
Runtime's own optimizer finds every layer of BERT (attention, embeddings, skip LayerNorms, GELU), and its fastest here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.rival import Bind, Run, missing
from fastbert.workloads import Batch

DTYPES_OF = ("fp32", "int8")
INPUTS, OUTPUT, OPSET = ("input_ids", "attention_mask", "token_type_ids"), "last_hidden_state", 17


def available() -> str:
    return missing(("onnx", "onnxruntime"))


def make(model: Any, dtype: str, folder: Path) -> Bind:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads leave the next engine in peace
    options.log_severity_level = 3
    with quiet():
        file = quantized(model, folder) if dtype == "int8" else optimized(model, folder)
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    wanted = [put.name for put in session.get_inputs()]

    def bind(batch: Batch) -> Run:
        given = {name: x.numpy() for name, x in batch.inputs().items() if name in wanted}
        return lambda: torch.from_numpy(session.run(None, given)[0])

    return bind


class LastHiddenState(torch.nn.Module):
    """A model with that output alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(**dict(zip(INPUTS, inputs, strict=True))).last_hidden_state
        return hidden


def exported(model: Any, folder: Path) -> Path:
    """The model as ONNX, any batch size and any length."""
    file = folder / "model.onnx"
    if not file.exists():
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("eager")
        axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, OUTPUT)}
        ids = torch.ones(2, 8, dtype=torch.int64)
        torch.onnx.export(
            LastHiddenState(plain), (ids, ids, torch.zeros_like(ids)), str(file), dynamo=False, opset_version=OPSET,
            input_names=list(INPUTS), output_names=[OUTPUT], dynamic_axes=axes,
        )  # fmt: skip
    return file


def optimized(model: Any, folder: Path) -> Path:
    """After ONNX Runtime's optimizer for BERT.

    Raises:
        RuntimeError: it did not find every layer's attention.
    """
    file = folder / "optimized.onnx"
    if not file.exists():
        from onnxruntime.transformers import optimizer

        sizes = {"num_heads": model.config.num_attention_heads, "hidden_size": model.config.hidden_size}
        found = optimizer.optimize_model(str(exported(model, folder)), model_type="bert", opt_level=1, **sizes)
        fused = found.get_fused_operator_statistics()["Attention"]
        if fused != model.config.num_hidden_layers:
            raise RuntimeError(f"ONNX Runtime's optimizer fused {fused} of {model.config.num_hidden_layers} attentions")
        found.save_model_to_file(str(file))
    return file


def quantized(model: Any, folder: Path) -> Path:
    """Weights in int8, a scale a column; activations as they come."""
    file = folder / "int8.onnx"
    if not file.exists():
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        untold = {"DefaultTensorType": TensorProto.FLOAT}  # of what stands behind ONNX Runtime's own nodes
        quantize_dynamic(
            optimized(model, folder), file, per_channel=True, weight_type=QuantType.QInt8, extra_options=untold
        )
    return file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporting warns and logs much that says nothing of the result."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
