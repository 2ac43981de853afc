from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import ADD_LAYER_NORM as SPEC
from tests.ops.common import (  # noqa: F401
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


def test_hidden_dropout_is_refused_in_words(backend):
    x, ones = torch.ones(3, 4, device=backend.device), torch.ones(4, device=backend.device)
    with pytest.raises(
        ops.BackendRefused, match=r"hidden dropout p = 0\.1 needs the op dropout_bits, which no backend has"
    ):
        backend(SPEC, (x, None, x, ones, ones, 1e-12, 0.1))


@pytest.mark.parametrize(
    ("x", "bias", "residual", "gamma", "beta", "words"),
    [
        ((3,), (4,), (3, 4), (4,), (4,), r"x has shape \[3\], expected \[any, any\]"),
        ((3, 4), (3,), (3, 4), (4,), (4,), r"bias has shape \[3\], expected \[4\]"),
        ((3, 4), (4,), (2, 4), (4,), (4,), r"residual has shape \[2, 4\], expected \[3, 4\]"),
        ((3, 4), (4,), (3, 4), (5,), (6,), r"gamma has shape \[5\], expected \[4\]; beta has shape \[6\]"),
    ],
)
def test_wrong_shapes_are_named(x, bias, residual, gamma, beta, words):
    with pytest.raises(ValueError, match=words):
        ops.add_layer_norm(*(torch.ones(shape) for shape in (x, bias, residual, gamma, beta)), 1e-12)


def test_an_fp32_residual_stream_stays_fp32(dtype, backend):
    """16-bit products beside fp32 residual and gains (autocast): y in the residual's dtype, no rounding to 16 bits."""
    x, residual = torch.randn(5, 64).to(dtype).to(backend.device), torch.randn(5, 64).to(backend.device)
    gamma, beta = torch.rand(64, device=backend.device), torch.rand(64, device=backend.device)
    y, mean, rstd = backend(SPEC, (x, None, residual, gamma, beta, 1e-12))
    assert (y.dtype, mean.dtype, rstd.dtype) == (torch.float32,) * 3
    wide = [a.double() for a in (x, residual, gamma, beta)]
    expected = torch.nn.functional.layer_norm(wide[0] + wide[1], (64,), *wide[2:], 1e-12)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
