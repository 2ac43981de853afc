"""The ops that the fast path computes with. Each is declared once in `declare.py` and specified in `reference.py`."""

from fastbert.ops.batch_invariant import use_batch_invariant
from fastbert.ops.builtins import pack_weight, packs
from fastbert.ops.declare import (
    ALL,
    BACKWARD,
    FORWARD,
    add_layer_norm,
    attention,
    bias_gelu,
    dropout_bits,
    embed_layer_norm,
    feed_forward,
    linear,
    linear_gelu,
    pad,
    quantized_linear,
    unpad,
)
from fastbert.ops.packed import PackedWeight
from fastbert.ops.reference import LENGTH_CLASSES
from fastbert.ops.registry import BACKENDS, Backend, BackendRefused, Call, Op, record, use_backend

__all__ = [
    "ALL", "BACKENDS", "BACKWARD", "FORWARD", "LENGTH_CLASSES", "Backend", "BackendRefused", "Call", "Op",
    "PackedWeight", "add_layer_norm", "attention", "bias_gelu", "dropout_bits", "embed_layer_norm", "feed_forward",
    "linear", "linear_gelu", "pack_weight", "packs", "pad", "quantized_linear", "record", "unpad", "use_backend",
    "use_batch_invariant",
]  # fmt: skip
