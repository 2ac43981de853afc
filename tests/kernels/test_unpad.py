"""What the tests of every backend in tests/ops/test_unpad.py leave open: batch sizes, tiles, dtypes, who waits."""

import pytest
import torch
from fastbert.kernels import unpad as kernels

from tests.ops.test_unpad import by_hand, right_padded

pytestmark = pytest.mark.usefixtures("poisoned")


def found(mask, tokens=-1):
    assert kernels.unpad_reasons(mask, tokens) == []
    return tuple(x.tolist() for x in kernels.unpad(mask, tokens))


def test_every_batch_size():
    """Sequences below, at and above what a program ranks and compares with; many of one length; empty ones."""
    tiles = kernels.choose_tiles()
    assert max(tiles.sequences, tiles.others, tiles.rows) < 70
    for batch in (*range(1, 10), *range(30, 35), *range(62, 71)):
        mask = torch.rand(batch, 1 + batch % 7) < 0.6
        expected = by_hand(mask)
        assert found(mask, len(expected[0]) if batch % 2 else -1) == expected, batch


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_tiles_of_columns(length):
    assert kernels.choose_tiles().columns == 256
    mask = torch.rand(5, length) < 0.5
    mask[2] = False
    assert found(mask) == by_hand(mask)


@pytest.mark.parametrize("dtype", kernels.MASKS, ids=str)
def test_every_dtype_with_holes_and_strides(dtype):
    values = torch.tensor([[0, 1, 0, 3, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 2, 0, 0, 0, 1]])
    mask = values.to(dtype)
    for view in (lambda x: x, lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:, 2:5], lambda x: x[2:3].expand(6, -1)):
        assert found(view(mask)) == by_hand(view(values) != 0)
    assert found(torch.zeros_like(mask)) == ([], [0] * 5, [0, 1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floats_that_are_not_zero(dtype):
    """The least subnormal number, NaN of either sign, infinities; both zeros are padding."""
    least = torch.tensor([1], dtype=kernels.BITS[dtype.itemsize]).view(dtype)
    mask = torch.cat([least, -least, torch.tensor([torch.nan, -torch.nan, torch.inf, 0.0, -0.0, 1e-3], dtype=dtype)])
    assert found(mask[None]) == ([0, 1, 2, 3, 4, 7], [0, 6], [0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_integers_of_the_highest_bit_alone(dtype):
    highest = 128 if dtype == torch.uint8 else torch.iinfo(dtype).min
    assert found(torch.tensor([[highest, 0, 2]], dtype=dtype)) == ([0, 2], [0, 2], [0])


def test_other_numbers_of_tokens_than_there_are():
    """Nothing is written outside, and nothing is left unwritten."""
    mask = right_padded((3, 0, 600, 2))
    indices, *rest = by_hand(mask)
    assert found(mask, 4) == (indices[:4], *rest)
    assert found(mask, 1500) == (indices + [-1] * (1500 - len(indices)), *rest)
    assert found(torch.zeros(2, 3), 0) == ([], [0, 0, 0], [0, 1])
    assert found(torch.zeros(0, 3), 2) == ([-1, -1], [0], [])


def test_the_host_waits_only_where_the_tokens_are_not_known(monkeypatch):
    reads = []
    for name in ("__int__", "item", "tolist", "__bool__", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *a, real=real, name=name: reads.append(name) or real(x, *a))
    mask = right_padded((3, 1))
    monkeypatch.setattr(kernels.count_kernel.__class__, "__getitem__", lambda *_: lambda *a, **b: None)  # no launches
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, n, **options: torch.zeros(n, **options))
    kernels.unpad(mask, 4)
    assert reads == []
    kernels.unpad(mask)
    assert reads == ["__int__"]


def test_refusals_in_words():
    assert kernels.unpad_reasons(torch.ones(2, 3, dtype=torch.complex64)) == [
        "mask is torch.complex64: it takes bool, integers and floats of 16 to 64 bits"
    ]
    assert "torch.float8_e4m3fn" in kernels.unpad_reasons(torch.ones(2, 3).to(torch.float8_e4m3fn))[0]
    wide = torch.ones(1, 1, dtype=torch.bool).expand(65536, 32768)
    assert kernels.unpad_reasons(wide) == ["a mask of 2147483648 elements, over 2147483647"]
    assert kernels.unpad_reasons(wide[:65535]) == []
    assert kernels.unpad_reasons(torch.ones(2, 3, device="meta")) == ["device meta is not cuda"]
