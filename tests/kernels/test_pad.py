"""What the tests of every backend in tests/ops/test_pad.py leave open: tiles, dtypes, indices that are out of range."""

import pytest
import torch
from fastbert.kernels import pad as kernels

from tests.ops.test_unpad import right_padded

# Real sizes; at, below and above a tile; odd; one
HIDDEN = [1, 7, 63, 64, 65, 120, 312, 384, 511, 512, 513, 768, 1024, 2048, 4096]
DTYPES = [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]

pytestmark = pytest.mark.usefixtures("poisoned")


def by_hand(x, indices, batch, length):
    out = torch.zeros(batch * length, x.shape[1], dtype=x.dtype)
    for row, index in enumerate(indices.tolist()):
        if 0 <= index < batch * length:
            out[index] = x[row]
    return out.view(batch, length, x.shape[1])


def gathered(grad, indices):
    rows = grad.reshape(-1, grad.shape[2])
    found = [rows[i] if 0 <= i < len(rows) else torch.zeros_like(rows[0]) for i in indices.tolist()]
    return torch.stack(found)


def random(dtype, *shape):
    return (torch.randn(shape) * 4).to(dtype)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_tiles(itemsize):
    for hidden in (*HIDDEN, *range(1, 300)):
        tiles = kernels.choose_tiles(hidden, itemsize)
        size = tiles.rows * tiles.columns
        assert size & (size - 1) == 0 and size * itemsize <= 8192
        assert tiles.columns >= 64 or tiles.columns >= hidden
        assert -(-hidden // 64) >= -(-hidden // tiles.columns)  # blocks, as `reasons` counts them
    for hidden in (384, 768, 1024):
        assert hidden % kernels.choose_tiles(hidden, itemsize).columns == 0


@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_hidden_size(hidden):
    mask = right_padded((3, 0, 5, 1))
    indices, x, grad = mask.flatten().nonzero().flatten(), random(torch.float32, 9, hidden), torch.randn(4, 5, hidden)
    grad[~mask] = torch.nan
    assert torch.equal(kernels.pad(x, indices, 4, 5), by_hand(x, indices, 4, 5))
    assert torch.equal(kernels.pad_backward(grad, indices), gathered(grad, indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves_bits(dtype):
    mask = torch.rand(9, 31) < 0.5  # holes
    indices = mask.flatten().nonzero().flatten()
    x, grad = random(dtype, len(indices), 72), random(dtype, 9, 31, 72)
    assert torch.equal(kernels.pad(x, indices, 9, 31), by_hand(x, indices, 9, 31))
    assert torch.equal(kernels.pad_backward(grad, indices), gathered(grad, indices))


def test_more_indices_than_one_program_inverts():
    indices = torch.randperm(3000)[: 2 * kernels.INVERTED + 1]
    x, grad = torch.randn(len(indices), 8), torch.randn(10, 300, 8)
    for chosen in (indices, indices.int(), indices.repeat_interleave(2)[::2]):
        assert torch.equal(kernels.pad(x, chosen, 10, 300), by_hand(x, indices, 10, 300))
        assert torch.equal(kernels.pad_backward(grad, chosen), gathered(grad, indices))


def test_indices_out_of_range_are_left_out():
    """Neither written nor read: the nearest rows are another tensor's."""
    x, indices = torch.randn(6, 5), torch.tensor([0, 12, -1, 2**40, 3, -(2**40)])
    around = torch.full((20, 5), torch.nan)
    inside = around[4:16].view(3, 4, 5)
    assert torch.equal(kernels.pad(x, indices, 3, 4), by_hand(x, indices, 3, 4))
    inside.copy_(torch.randn(3, 4, 5))
    assert torch.equal(kernels.pad_backward(inside, indices), gathered(inside, indices))


def test_the_last_of_equal_indices_stands_there():
    x, indices = torch.randn(5, 3), torch.tensor([1, 2, 1, 2, 1])
    assert torch.equal(kernels.pad(x, indices, 1, 4), by_hand(x, indices, 1, 4))


def test_strided_and_expanded_inputs():
    indices = torch.tensor([0, 2, 5])
    for x in (torch.randn(3, 16)[:, ::2], torch.randn(8, 3).T, torch.randn(1, 8).expand(3, 8)):
        assert torch.equal(kernels.pad(x, indices, 2, 3), by_hand(x, indices, 2, 3))
    for grad in (
        torch.randn(2, 3, 16)[:, :, ::2],
        torch.randn(8, 3, 2).permute(2, 1, 0),
        torch.randn(1, 1, 8).expand(2, 3, 8),
    ):
        found = kernels.pad_backward(grad, indices)
        assert torch.equal(found, gathered(grad, indices)) and found.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4)])
def test_nothing_to_move(shape):
    batch, length, hidden = shape
    x, indices = torch.randn(0, hidden), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(kernels.pad(x, indices, batch, length), torch.zeros(shape))
    assert kernels.pad_backward(torch.randn(shape), indices).shape == (0, hidden)


def test_zeros_are_positive():
    assert not kernels.pad(-torch.ones(1, 8), torch.tensor([1]), 1, 4)[0, 2:].signbit().any()


def test_refusals_in_words():
    x = torch.ones(2, 3, dtype=torch.complex128)
    assert kernels.pad_reasons(x, torch.tensor([0, 1]), 1, 2) == ["elements of 16 bytes: it moves 1, 2, 4 and 8"]
    wide = torch.ones(1, 1).expand(1, 64 * 65535 + 1)
    assert kernels.pad_reasons(wide, torch.tensor([0]), 2**16, 2**15) == [
        "2147483648 padded rows, over 2147483647",
        "hidden size 4194241, over 4194240",
    ]
    grad = torch.ones(1, 1, 3, device="meta")
    assert kernels.pad_backward_reasons(grad, torch.tensor([0])) == ["device meta is not cuda"]
