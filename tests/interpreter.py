"""Triton's interpreter with its 16-bit arithmetic repaired (Triton 3.6 to 3.9), and hastened.

Unrepaired it is wrong without a word: float32 → bfloat16 is cut off instead of rounded, a product of bfloat16 matrices
multiplies their bit patterns, other arithmetic on bfloat16 takes them for integers, and TF32 is all of float32. And
Triton 3.6's bounds of loops are arrays of one element, which numpy takes for integers up to 2.4 only.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import numpy as np
import torch

TF32_BITS = np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of mantissa, as tensor cores read float32


@functools.cache
def is_here() -> bool:
    """Whether kernels run in the interpreter in this process; it is repaired then."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return False
    repair()
    return True


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 → the same values in float32."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 as uint16, to the nearest, ties to even: torch's rounding."""
    tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    return tensor.to(torch.bfloat16).view(torch.uint16).numpy()


def cut(values: np.ndarray) -> np.ndarray:
    """float32 → TF32."""
    return (np.array(values, dtype=np.float32).view(np.uint32) & TF32_BITS).view(np.float32)


def hasten(interpreter: Any) -> None:
    """Lets a launch replace the functions of Triton's language once, not at every call of a device function."""
    replaced = set[int]()  # the globals of functions that were called in this launch
    launch = interpreter.GridExecutor.__call__

    def once_a_launch(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = once_a_launch, call


def repair() -> None:
    """Repairs the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "repaired"):
        return
    builder.repaired = True
    convert, dot, reduce = interpreter._convert_float, builder.create_dot, interpreter.ReduceOps.apply_impl

    def is_bfloat16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def repaired_convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if (source, target) == (tl.float32, tl.bfloat16) and nearest:
            return rounded(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(values).view(np.uint32)
        return convert(values, source, target, rounding)

    def operand(handle: Any, precision: Any) -> Any:
        if is_bfloat16(handle):
            return interpreter.TensorHandle(widened(handle.data), tl.float32)
        if handle.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            return interpreter.TensorHandle(cut(handle.data), tl.float32)
        return handle

    def repaired_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, *rest: Any) -> Any:
        return dot(self, operand(a, precision), operand(b, precision), accumulator, precision, *rest)

    def refusing(method: Any) -> Any:
        def refuse_bfloat16(self: Any, *arguments: Any, **options: Any) -> Any:
            handles = [a for a in arguments if isinstance(a, interpreter.TensorHandle)]
            if any(is_bfloat16(handle) for handle in handles):
                raise TypeError("the interpreter computes with the bits of bfloat16: cast it to float32 first")
            return method(self, *arguments, **options)

        return refuse_bfloat16

    def refusing_reduce(self: Any, inputs: Any) -> Any:
        if any(is_bfloat16(each.handle) for each in inputs):
            raise TypeError("bfloat16 is reduced without a wider sum: cast it to float32 first")
        return reduce(self, inputs)

    patch = interpreter._patch_lang_tensor

    def repaired_patch(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    hasten(interpreter)
    interpreter._convert_float, interpreter._patch_lang_tensor = repaired_convert, repaired_patch
    builder.create_dot, interpreter.ReduceOps.apply_impl = repaired_dot, refusing_reduce
    builder.binary_op, builder.unary_op = refusing(builder.binary_op), refusing(builder.unary_op)
