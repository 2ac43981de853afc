from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import LINEAR_GELU as SPEC
from tests.ops.cases import cast, gelu_inputs
from tests.ops.common import (  # noqa: F401
    arguments_of,
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


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_over_the_full_range(dtype, backend, approximate, parity):
    """Every finite 16-bit value, 128 fp32 values of each binade: judged per binade of the result."""
    exact = gelu_inputs(dtype, approximate)
    rounded = cast(exact, dtype)
    ours, _ = backend(SPEC, arguments_of(SPEC, exact, dtype, backend))
    (ref, _), (base, _) = (
        SPEC.reference(*cast(rounded, torch.float64)),
        SPEC.stock(*cast(rounded, dtype, backend.device)),
    )
    parity(ours.cpu(), ref, base.cpu(), name=f"gelu/{backend}/{approximate}", elementwise=True)


def test_an_unknown_approximation_is_refused():
    with pytest.raises(ValueError, match=r"approximate is 'erf', expected 'none' \(erf\) or 'tanh'"):
        ops.linear_gelu(torch.ones(3, 4), torch.ones(5, 4), None, "erf")
