"""OpenVINO, converted from the PyTorch model: fp32, bf16, and int8 by NNCF's quantization after training.

NNCF measures activations on docstrings that are not among those timed, by its settings for transformers (SmoothQuant).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import loads
from benchmarks.peers.ort import quiet
from benchmarks.peers.rival import Bind, Run, missing
from fastbert.workloads import Batch

DTYPES_OF = ("fp32", "bf16", "int8")
PRECISION = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of what is not quantized


def available() -> str:
    return missing(("openvino",))


def make(model: Any, dtype: str, folder: Path) -> Bind:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = PRECISION[dtype]
    with quiet():
        file = quantized(model, folder) if dtype == "int8" else converted(model, folder)
        compiled = openvino.compile_model(str(file), "CPU", settings)
    took = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if took != PRECISION[dtype]:
        raise RuntimeError(f"OpenVINO computes in {took} on this CPU, not in {PRECISION[dtype]}")
    request = compiled.create_infer_request()

    def bind(batch: Batch) -> Run:
        given = {name: x.numpy() for name, x in batch.inputs().items()}
        return lambda: torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    return bind


def converted(model: Any, folder: Path) -> Path:
    """OpenVINO's form of the model, any batch size and any length, weights in fp32."""
    file = folder / "openvino.xml"
    if not file.exists():
        import openvino

        ids = torch.ones(2, 8, dtype=torch.int64)
        given = {"input_ids": ids, "attention_mask": ids, "token_type_ids": torch.zeros_like(ids)}
        found = openvino.convert_model(copy.deepcopy(model), example_input=given)
        openvino.save_model(found, str(file), compress_to_fp16=False)
    return file


def quantized(model: Any, folder: Path) -> Path:
    """Weights and activations in int8.

    Raises:
        RuntimeError: NNCF is not installed.
    """
    file = folder / "openvino-int8.xml"
    if not file.exists():
        if reason := missing(("nncf",)):
            raise RuntimeError(reason)
        import nncf
        import openvino

        rows = [{name: x.numpy() for name, x in batch.inputs().items()} for batch in loads.calibration(model)]
        whole = openvino.Core().read_model(str(converted(model, folder)))
        found = nncf.quantize(whole, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
        openvino.save_model(found, str(file), compress_to_fp16=False)
    return file
