from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import FEED_FORWARD
from tests.ops.every_op import *  # noqa: F403
from tests.ops.gradients import test_the_slope_of_gelu_over_the_full_range  # noqa: F401

SPEC = FEED_FORWARD


@pytest.mark.parametrize(
    ("w1", "b1", "w2", "b2", "words"),
    [
        ((6, 5), (6,), (4, 6), (4,), r"weight has shape \[6, 5\], expected \[any, 4\]"),
        ((6, 4), (4,), (4, 6), (4,), r"bias has shape \[4\], expected \[6\]"),
        ((6, 4), (6,), (4, 4), (4,), r"w2 has shape \[4, 4\], expected \[any, 6\]"),
        ((6, 4), (6,), (4, 6), (6,), r"b2 has shape \[6\], expected \[4\]"),
    ],
)
def test_wrong_shapes_are_named(w1, b1, w2, b2, words):
    with pytest.raises(ValueError, match=words):
        ops.feed_forward(torch.ones(3, 4), *(torch.ones(shape) for shape in (w1, b1, w2, b2)))


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"x is torch\.float32 and w2 is torch\.bfloat16"):
        ops.feed_forward(torch.ones(3, 4), torch.ones(6, 4), None, torch.ones(4, 6).bfloat16(), None)


def test_it_is_two_products(dtype, backend):
    """feed_forward is linear(linear_gelu(x)) by the same backend: bitwise, but for the reference, which rounds once."""
    if backend.name == "reference":
        return
    x, w1, b1, w2, b2 = (
        torch.randn(s, device=backend.device).to(dtype) for s in ((9, 16), (32, 16), (32,), (16, 32), (16,))
    )
    if backend.packed:
        w1, w2 = backend.pack(w1), backend.pack(w2)
    with ops.use_backend(backend.name):
        for save in (False, True):
            y, pre = ops.feed_forward(x, w1, b1, w2, b2, save=save)
            inner, same = ops.linear_gelu(x, w1, b1, save=save)
            with ops.use_backend(backend.name, "torch"):  # whose products the CUDA kernels stand behind
                assert torch.equal(y, ops.linear(inner, w2, b2)) and torch.equal(pre, same)
