from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import FEED_FORWARD
from tests.ops.common import (  # noqa: F401
    test_dtypes_and_shapes,
    test_inputs_are_not_written,
    test_opcheck,
    test_other_sequences_do_not_matter,
    test_parity,
    test_reference_is_the_formula,
    test_reruns_are_bitwise_equal,
    test_strided_inputs,
)
from tests.ops.gradients import (  # noqa: F401
    test_a_backward_op_is_not_differentiated_itself,
    test_gradcheck,
    test_gradients,
    test_gradients_are_bitwise_the_same_again,
    test_gradients_of_strided_tensors,
    test_gradients_share_no_memory,
    test_no_tokens_no_gradient,
    test_only_what_is_needed_is_returned,
    test_opcheck_of_gradients,
    test_opcheck_of_the_backward,
    test_other_sequences_get_no_gradient,
    test_reference_gradients_are_the_formulas,
    test_second_derivatives,
    test_the_slope_of_gelu_over_the_full_range,
)

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
        w1, w2 = ops.pack_weight(w1), ops.pack_weight(w2)
    with ops.use_backend(backend.name):
        for save in (False, True):
            y, pre = ops.feed_forward(x, w1, b1, w2, b2, save=save)
            inner, same = ops.linear_gelu(x, w1, b1, save=save)
            assert torch.equal(y, ops.linear(inner, w2, b2)) and torch.equal(pre, same)
