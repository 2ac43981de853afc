from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import BIAS_GELU as SPEC
from tests.ops.cases import cast, gelu_inputs
from tests.ops.every_op import *  # noqa: F403
from tests.ops.gradients import test_the_slope_of_gelu_over_the_full_range  # noqa: F401


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_over_the_full_range(dtype, backend, approximate, parity):
    """Every finite 16-bit value, 128 fp32 values of each binade: judged per binade of the result."""
    arguments = (cast(gelu_inputs(dtype, approximate), dtype)[0], None, approximate)
    (ours,) = backend(SPEC, cast(arguments, dtype, backend.device))
    ref, base = SPEC.reference(*cast(arguments, torch.float64)), SPEC.stock(*cast(arguments, dtype, backend.device))
    parity(ours.cpu(), ref, base.cpu(), name=f"bias_gelu/{backend}/{approximate}/full range", elementwise=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_far_out_it_is_exactly_zero_or_x(dtype, backend, approximate):
    x = torch.tensor([[16.0, -16.0, 1e4, -1e4, 6e4, -6e4, 0.0, -0.0]], dtype=dtype, device=backend.device)
    (y,) = backend(SPEC, (x, None, approximate))
    assert torch.equal(y, torch.where(x > 0, x, 0))


@pytest.mark.parametrize(
    ("x", "bias", "approximate", "words"),
    [
        ((3,), None, "none", r"x has shape \[3\], expected \[any, any\]"),
        ((3, 4), (3,), "erf", r"bias has shape \[3\], expected \[4\]; approximate is 'erf'"),
    ],
)
def test_wrong_arguments_are_named(x, bias, approximate, words):
    with pytest.raises(ValueError, match=words):
        ops.bias_gelu(torch.ones(x), None if bias is None else torch.ones(bias), approximate)


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"x is torch\.float32 and bias is torch\.bfloat16"):
        ops.bias_gelu(torch.ones(3, 4), torch.ones(4).bfloat16())
