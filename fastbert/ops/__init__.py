"""The ops that the fast path computes with. Each is declared once in `declare.py` and specified in `reference.py`."""

from fastbert.ops.batch_invariant import use_batch_invariant
from fastbert.ops.declare import (
    ALL,
    BACKWARD,
    FORWARD,
    add_layer_norm,
    attention,
    bias_gelu,
    dropout_bits,
    embed_layer_norm,
    encoder_forward,
    feed_forward,
    linear,
    linear_gelu,
    pad,
    quantized_linear,
    unpad,
)
from fastbert.ops.encoder import TENSORS as LAYER_TENSORS
from fastbert.ops.packed import PackedWeight, PanelWeight
from fastbert.ops.packing import encodes, pack_weight, packer
from fastbert.ops.reference import LENGTH_CLASSES
from fastbert.ops.registry import BACKENDS, Backend, BackendRefused, Call, Op, record, use_backend

__all__ = [
    "ALL", "BACKENDS", "BACKWARD", "FORWARD", "LAYER_TENSORS", "LENGTH_CLASSES", "Backend", "BackendRefused", "Call",
    "Op", "PackedWeight", "PanelWeight", "add_layer_norm", "attention", "bias_gelu", "dropout_bits", "embed_layer_norm",
    "encoder_forward", "encodes", "feed_forward", "linear", "linear_gelu", "pack_weight", "packer", "pad",
    "quantized_linear", "record", "unpad", "use_backend", "use_batch_invariant",
]  # fmt: skip
