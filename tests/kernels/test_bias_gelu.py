"""What tests/ops/test_bias_gelu.py leaves open: tiles, no launch without elements, planted errors."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from benchmarks import stock
from fastbert.parity import judge
from tests import interpreter

if not interpreter.is_here():
    pytest.skip("Triton's interpreter is not here", allow_module_level=True)

from fastbert.kernels import bias_gelu, cards, linear_gelu

from fastbert.ops import reference
from tests.kernels.test_linear import planted
from tests.ops.cases import DTYPES, normal


def ratios(module: ModuleType, approximate: str = "none", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """How y and the gradients are judged; several programs each way, a rest of rows and columns."""
    x, bias, grad = (normal(*s, like=str(s), scale=2).to(dtype) for s in ((37, 300), (300,), (37, 301)))
    grad = grad[:, :300]
    y, gradients = (
        module.bias_gelu(x, bias, approximate),
        module.bias_gelu_backward(grad, x, bias, approximate, [True] * 2),
    )
    exact = x.double(), bias.double(), approximate
    ref = reference.bias_gelu(*exact), *reference.bias_gelu_backward(grad.double(), *exact, [True] * 2)
    base = (
        stock.bias_gelu(x, bias, approximate),
        *stock.gradients(stock.bias_gelu, (x, bias, approximate), (0, 1), grad),
    )
    names = "y", "x_grad", "bias_grad"
    return {n: judge(*tensors).ratio for n, *tensors in zip(names, (y, *gradients), ref, base, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_rests_of_rows_and_columns(approximate, dtype, poisoned):
    for name, ratio in ratios(bias_gelu, approximate, dtype).items():
        assert ratio <= 1, f"{name}: {ratio}"


@pytest.mark.parametrize("columns", [1, 64, 257, 1536, 3072, 4096])
def test_tiles_hold_16_elements_a_thread(columns):
    tiles = bias_gelu.choose_tiles(columns, torch.bfloat16, cards.Card(90, 132))
    assert tiles.rows * tiles.columns == 16 * 32 * tiles.num_warps


def test_no_launch_without_elements(monkeypatch):
    monkeypatch.setattr(bias_gelu, "bias_gelu_kernel", None)
    monkeypatch.setattr(linear_gelu, "gelu_backward_kernel", None)
    x, bias = torch.empty(0, 8), torch.ones(8)
    assert bias_gelu.bias_gelu(x, bias).shape == (0, 8)
    dx, dbias = bias_gelu.bias_gelu_backward(x, x, bias, "none", [True, True])
    assert dx.shape == (0, 8) and torch.equal(dbias, torch.zeros(8))


PLANTED = {
    "no bias": ("BIAS, columns, N)\n    tl.store", "None, columns, N)\n    tl.store", "y"),
    "tanh for erf": ("gelu(x, APPROXIMATE, Y", 'gelu(x, "tanh", Y', "y"),
    "the last rows are not written": ("rows < tokens)", "rows < tokens - 1)", "y"),
    "the slope without the bias": ("approximate, bias)\n    return", "approximate)\n    return", "x_grad"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, tmp_path, poisoned):
    old, new, shown = PLANTED[error]
    assert not ratios(planted("bias_gelu", old, new, tmp_path))[shown] <= 1
