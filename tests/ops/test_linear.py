from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import LINEAR as SPEC
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
)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        ((3, 4, 1), (5, 4), (5,), r"x has shape \[3, 4, 1\], expected \[any, any\]"),
        ((3, 4), (5, 6), (5,), r"weight has shape \[5, 6\], expected \[any, 4\]"),
        ((3, 4), (5, 4), (4,), r"bias has shape \[4\], expected \[5\]"),
    ],
)
def test_wrong_shapes_are_named(x, weight, bias, words):
    with pytest.raises(ValueError, match=words):
        ops.linear(torch.ones(x), torch.ones(weight), torch.ones(bias))


def test_two_dtypes_are_refused(dtype):
    if dtype != torch.float32:
        with pytest.raises(ValueError, match=f"x is {dtype} and weight is torch.float32"):
            ops.linear(torch.ones(3, 4, dtype=dtype), torch.ones(5, 4))


def test_autocast_is_off_inside(backend):
    x, weight = torch.ones(3, 8, device=backend.device), torch.ones(5, 8, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert backend(SPEC, (x, weight, None))[0].dtype == torch.float32
