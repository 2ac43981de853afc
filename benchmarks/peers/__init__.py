"""The engines of `python -m benchmarks.cpu_peers`, a file each, and how they are compared.

What stands here is the list: a name of the command line → the engine.
"""

from __future__ import annotations

from functools import partial

from benchmarks.peers import ctranslate2, hf, openvino, ort, ours
from benchmarks.peers.rival import Rival

OURS = "fastbert"


def engines(dry_run: bool = False) -> dict[str, Rival]:
    """Every engine, whether it is installed or not; a dry run does not wait for a compiler."""
    compiled = partial(hf.make, compiled=hf.TRACE if dry_run else hf.COMPILE)
    return {
        "hf": Rival("HuggingFace", hf.DTYPES_OF, hf.available, hf.make),
        "compile": Rival("HF, torch.compile", hf.DTYPES_OF, hf.compiler, compiled),
        "onnxruntime": Rival("ONNX Runtime", ort.DTYPES_OF, ort.available, ort.make),
        "openvino": Rival("OpenVINO", openvino.DTYPES_OF, openvino.available, openvino.make),
        "ctranslate2": Rival("CTranslate2", ctranslate2.DTYPES_OF, ctranslate2.available, ctranslate2.make),
        OURS: Rival("fastbert", tuple(ours.PRECISIONS), ours.available, ours.make),
    }
