from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import LINEAR_GELU as SPEC
from tests.ops.cases import cast, gelu_inputs
from tests.ops.common import arguments_of
from tests.ops.every_op import *  # noqa: F403
from tests.ops.gradients import test_the_slope_of_gelu_over_the_full_range  # noqa: F401


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
