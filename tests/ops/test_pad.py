from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import CASES, DEVICES, DTYPES, NO_TOKENS
from tests.ops.test_unpad import right_padded

BACKENDS = [(b.name, device) for device in DEVICES for b in ops.pad.order(device)]
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
    indices, _ = ops.unpad(mask)
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


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"indices has shape \[2\], expected \[3\]"):
        ops.pad(torch.ones(3, 4), torch.tensor([0, 1]), 2, 2)
    with pytest.raises(ValueError, match=r"indices is torch\.float32, expected int64 or int32"):
        ops.pad(torch.ones(3, 4), torch.ones(3), 2, 2)


def test_opcheck():
    arguments = (torch.randn(3, 4), torch.tensor([0, 2, 3]), 2, 2)
    torch.library.opcheck(torch.ops.fastbert.pad.default, arguments, test_utils=("test_schema", "test_faketensor"))
