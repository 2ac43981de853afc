from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import ADD_LAYER_NORM as SPEC
from tests.ops.cases import cast
from tests.ops.common import EDGES
from tests.ops.every_op import *  # noqa: F403
from tests.ops.gradients import gradients, ref_and_base, upstream


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


def test_gradients_beside_an_fp32_residual_stream(dtype, plain_backend, parity):
    """As under autocast: x and bias in 16 bits, residual and gains in fp32; each gradient in the dtype of its input."""
    for name, exact in SPEC.inputs(EDGES, dtype):
        wide = cast(exact, torch.float32, plain_backend.device)
        narrow = cast(cast(exact, dtype), dtype, plain_backend.device)
        mixed = (*narrow[:2], *wide[2:])
        grad, ref, base = ref_and_base(SPEC, mixed, upstream(SPEC, mixed, torch.float32, name).to(plain_backend.device))
        for output, ours in gradients(SPEC, mixed, grad, plain_backend).items():
            given = mixed[SPEC.op.arguments().index(output.removesuffix("_grad"))]
            assert ours.dtype == given.dtype == base[output].dtype
            check = f"add_layer_norm_backward/{plain_backend}/{output}/fp32 residual/{name}"
            parity(ours.cpu(), ref[output], base[output].cpu(), name=check, elementwise=SPEC.elementwise(output))


def test_one_column_has_no_gradient(dtype, plain_backend):
    """What a row of one element is normalized to does not depend on it: exactly zeros, whatever rounding leaves."""
    if plain_backend.name == "reference":
        return  # from a mean that was rounded to fp32: its float64 takes the rounding for x
    arguments = cast(tuple(torch.randn(9, 1) for _ in range(2)), dtype, plain_backend.device)
    x, residual = (a.requires_grad_() for a in arguments)
    gamma, beta = (torch.randn(1).to(x) for _ in range(2))
    with ops.use_backend(plain_backend.name):
        y, _, _ = ops.add_layer_norm(x, None, residual, gamma, beta, 1e-12)
        y.backward(torch.randn(9, 1).to(y))
    assert not x.grad.any() and not residual.grad.any()
