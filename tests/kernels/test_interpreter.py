"""The interpreter that the kernels are tested in, against torch's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import interpreter

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def copied(source, target, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@triton.jit
def multiplied(a, b, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = rows * SIZE + columns
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place), input_precision=PRECISION))


@triton.jit
def added(a, b, out, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out + place, tl.load(a + place) + tl.load(b + place))


@triton.jit
def summed(a, out, COUNT: tl.constexpr):
    tl.store(out, tl.sum(tl.load(a + tl.arange(0, COUNT)), 0))


@triton.jit
def counted(bound, out):
    total = 0
    for i in range(tl.load(bound)):
        total += i
    tl.store(out, total)


def all_floats() -> torch.Tensor:
    """float32 values: every pattern of the upper half with lower halves that round down, up, and to even both ways."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper + lower).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def test_float32_is_rounded_to_bfloat16_as_torch_rounds():
    values = all_floats()
    out = torch.empty(2**19, dtype=torch.bfloat16)[: len(values)]
    for start in range(0, len(values), 2**14):  # 24 blocks
        copied[(1,)](values[start : start + 2**14], out[start:], COUNT=2**14)
    wanted = values.to(torch.bfloat16)
    finite = ~wanted.isnan()
    assert torch.equal(out[finite].view(torch.int16), wanted[finite].view(torch.int16))
    assert out[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_widened_exactly(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
    out = torch.empty(2**16)
    copied[(1,)](values, out, COUNT=2**16)
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_of_values(dtype):
    a, b, out = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    multiplied[(1,)](a, b, out, SIZE=32, PRECISION="ieee")
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_has_ten_bits_of_mantissa():
    one = torch.zeros(16, 16)
    one[0, 0] = 1 + 2**-10 + 2**-11
    out, exact, eye = torch.empty(16, 16), torch.empty(16, 16), torch.eye(16)
    multiplied[(1,)](one, eye, out, SIZE=16, PRECISION="tf32")
    multiplied[(1,)](one, eye, exact, SIZE=16, PRECISION="ieee")
    assert (float(out[0, 0]), float(exact[0, 0])) == (1 + 2**-10, 1 + 2**-10 + 2**-11)


def test_arithmetic_on_bfloat16_is_refused():
    values, out = torch.ones(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast it to float32 first"):
        added[(1,)](values, values, out, COUNT=16)
    with pytest.raises(Exception, match="cast it to float32 first"):
        summed[(1,)](values, torch.empty(1), COUNT=16)


def test_loops_run_to_a_loaded_bound():
    out = torch.empty(1, dtype=torch.int32)
    counted[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.tolist() == [10]


def test_cut_drops_what_tf32_lacks():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert ((interpreter.cut(values).view(np.uint32) & 0x1FFF) == 0).all()
    assert (np.abs(interpreter.cut(values) - values) <= np.abs(values) * 2**-10).all()
