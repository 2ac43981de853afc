from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import CASES, DEVICES, DTYPES, NO_TOKENS
from tests.ops.common import names_here
from tests.ops.test_unpad import right_padded

BACKENDS = [(name, device) for device in DEVICES for name in names_here(ops.pad, device)]
ids = {"ids": lambda v: "-".join(v) if isinstance(v, tuple) else str(v).removeprefix("torch.")}


def run(backend, x, indices, *sizes):
    with ops.use_backend(backend[0]):
        return ops.pad(x.to(backend[1]), indices.to(backend[1]), *sizes).cpu()


@pytest.mark.parametrize("backend", BACKENDS, **ids)
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("case", [*CASES, NO_TOKENS], **ids)
def test_rows_come_back_and_the_others_are_zeros(case, dtype, backend):
    mask = right_padded(case.lengths) if case.tokens else torch.zeros(2, 4, dtype=torch.bool)
    x = torch.randn(case.tokens, case.hidden).to(dtype)
    indices = mask.flatten().nonzero().flatten()
    padded = run(backend, x, indices, *mask.shape)
    assert padded.dtype == dtype and padded.shape == (*mask.shape, case.hidden)
    assert torch.equal(padded[mask], x)
    assert torch.equal(padded[~mask].view(-1), torch.zeros_like(padded[~mask]).view(-1))
    assert not padded[~mask].signbit().any()


@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_it_undoes_unpad(backend):
    """Also with holes and left padding, and for int32 indices."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    hidden = torch.randn(3, 4, 8)
    indices, *_ = ops.unpad(mask)
    for chosen in (indices, indices.int()):
        padded = run(backend, hidden.flatten(0, 1)[indices], chosen, 3, 4)
        assert torch.equal(padded, hidden * mask[:, :, None])


@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_nothing_padded_in_another_order(backend):
    """Indices that fill every place still say where each row goes."""
    x = torch.randn(6, 4)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    expected = torch.empty(6, 4)
    expected[order] = x
    assert torch.equal(run(backend, x, order, 2, 3), expected.view(2, 3, 4))


@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_strided_rows(backend):
    x = torch.randn(5, 16)[:, ::2]
    assert torch.equal(run(backend, x, torch.tensor([0, 1, 2, 4, 6]), 2, 4)[1, 2], x[4])


def gradient(backend, x, indices, grad):
    x, indices, grad = (t.to(backend[1]) for t in (x.detach(), indices, grad))
    with ops.use_backend(backend[0]):
        out = ops.pad(x.requires_grad_(), indices, *grad.shape[:2])
        (found,) = torch.autograd.grad(out, x, grad)
    assert found.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()
    return found.cpu()


@pytest.mark.parametrize("backend", BACKENDS, **ids)
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("case", [*CASES, NO_TOKENS], **ids)
def test_the_gradient_is_that_of_the_real_rows(case, dtype, backend):
    """Bitwise; what stands in the gradient of padding, here NaN, is not read."""
    mask = right_padded(case.lengths) if case.tokens else torch.zeros(2, 4, dtype=torch.bool)
    x, grad = torch.randn(case.tokens, case.hidden).to(dtype), torch.randn(*mask.shape, case.hidden).to(dtype)
    grad[~mask] = torch.nan
    found = gradient(backend, x, mask.flatten().nonzero().flatten(), grad)
    assert found.dtype == dtype and torch.equal(found, grad[mask])


@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_gradients_of_strided_tensors_and_other_orders(backend):
    order, x, grad = torch.tensor([5, 0, 3]), torch.randn(3, 4), torch.randn(2, 3, 8)[:, :, ::2]
    for indices in (order, order.int()):
        assert torch.equal(gradient(backend, x, indices, grad), grad.reshape(6, 4)[order])
        assert torch.equal(gradient(backend, x, indices, grad[:1, :1].expand(2, 3, 4)), grad[:1, 0].expand(3, 4))


@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_gradcheck(backend):
    x = torch.randn(3, 4, dtype=torch.float64, device=backend[1], requires_grad=True)
    indices = torch.tensor([0, 2, 3], device=backend[1])
    with ops.use_backend(backend[0]):
        assert torch.autograd.gradcheck(lambda x: ops.pad(x, indices, 2, 2), (x,))


def test_second_derivatives_are_refused_in_words():
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.pad(x, torch.tensor([0, 2, 3]), 2, 2).sum(), x, create_graph=True)
    assert not grad.requires_grad  # a constant of x


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"indices has shape \[2\], expected \[3\]"):
        ops.pad(torch.ones(3, 4), torch.tensor([0, 1]), 2, 2)
    with pytest.raises(ValueError, match=r"indices is torch\.float32, expected int64 or int32"):
        ops.pad(torch.ones(3, 4), torch.ones(3), 2, 2)


def test_opcheck():
    arguments = (torch.randn(3, 4, requires_grad=True), torch.tensor([0, 2, 3]), 2, 2)
    torch.library.opcheck(ops.pad.overload, arguments)
    backward = ops.pad.gradient.op.overload
    torch.library.opcheck(backward, (torch.randn(2, 2, 4), arguments[1]), test_utils=("test_schema", "test_faketensor"))
