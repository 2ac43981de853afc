from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import LINEAR_GELU as SPEC
from tests.ops.cases import cast, gelu_inputs, linear_gelu_stock
from tests.ops.common import (  # noqa: F401
    arguments_of,
    test_a_gradient_is_refused_in_words,
    test_dtypes_and_shapes,
    test_gradcheck_of_the_reference,
    test_inputs_are_not_written,
    test_opcheck,
    test_other_sequences_do_not_matter,
    test_parity,
    test_reference_is_the_formula,
    test_reruns_are_bitwise_equal,
    test_strided_inputs,
)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_over_the_full_range(dtype, backend, approximate, parity):
    """Every finite 16-bit value, 128 fp32 values of each binade: judged per binade of the result."""
    exact = gelu_inputs(dtype, approximate)
    rounded = cast(exact, dtype)
    (ours,) = backend(SPEC, arguments_of(SPEC, exact, dtype, backend))
    ref, base = SPEC.reference(*cast(rounded, torch.float64)), linear_gelu_stock(*cast(rounded, dtype, backend.device))
    parity(ours.cpu(), ref, base.cpu(), name=f"gelu/{backend}/{approximate}", elementwise=True)


def test_an_unknown_approximation_is_refused():
    with pytest.raises(ValueError, match=r"approximate is 'erf', expected 'none' \(erf\) or 'tanh'"):
        ops.linear_gelu(torch.ones(3, 4), torch.ones(5, 4), None, "erf")
