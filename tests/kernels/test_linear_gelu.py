"""linear_gelu: the epilogue on sm_80's and sm_90's paths, what is saved, independence of the batch, planted errors."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fastbert.parity import judge
from tests import interpreter

if not interpreter.is_here():
    pytest.skip("Triton's interpreter is not here", allow_module_level=True)

from fastbert.kernels import cards, linear, linear_gelu

from fastbert.ops import reference
from tests.kernels.test_linear import EVERY, NEW, OLD, operands, planted
from tests.ops.cases import normal


def ratios(module: ModuleType, size: tuple[int, int, int], dtype: torch.dtype, approximate: str) -> dict[str, float]:
    """How each result of the module's forward and backward is judged; size: tokens, columns, depth."""
    x, weight, bias, grad = operands(*size, dtype)
    y, pre = module.linear_gelu(x, weight, bias, approximate, True)
    ours = y, pre, *module.linear_gelu_backward(grad, x, weight, bias, pre, approximate, [True] * 3)

    def results(x, weight, bias, grad, slope_times):
        pre = F.linear(x, weight, bias)
        dpre = slope_times(grad, pre, approximate)
        gelu = reference.gelu(pre, approximate) if x.dtype == torch.float64 else F.gelu(pre, approximate=approximate)
        return gelu, pre, dpre @ weight, dpre.T @ x, dpre.sum(0)

    def stock(grad, pre, approximate):
        return torch.ops.aten.gelu_backward(grad, pre, approximate=approximate)

    ref = results(*(t.double() for t in (x, weight, bias, grad)), reference.gelu_backward)
    base = results(x, weight, bias, grad, stock)
    names = "y", "pre", "x_grad", "weight_grad", "bias_grad"
    return {n: judge(*tensors).ratio for n, *tensors in zip(names, ours, ref, base, strict=True)}


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(
    ("size", "approximate"),
    [
        pytest.param((140, 264, 72), "none", id="several tiles a program, a rest of each size"),
        pytest.param((40, 35, 33), "tanh", id="rows that wide loads cannot read"),
    ],
)
def test_epilogue(card, dtype, size, approximate, poisoned):
    with cards.imitate(card):
        for name, ratio in ratios(linear_gelu, size, dtype, approximate).items():
            assert ratio <= 1, f"{name}: {ratio}"


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_what_is_saved_changes_nothing(card, dtype, poisoned):
    """y is the same whether pre is saved; pre is what linear gives, and what the backward computes again without it."""
    x, weight, bias, grad = operands(70, 136, 40, dtype)
    with cards.imitate(card):
        y, pre = linear_gelu.linear_gelu(x, weight, bias, "none", True)
        same, empty = linear_gelu.linear_gelu(x, weight, bias)
        assert torch.equal(y, same) and empty.shape == (0,)
        assert torch.equal(pre, linear.linear(x, weight, bias))
        first, second = (
            linear_gelu.linear_gelu_backward(grad, x, weight, bias, saved, "none", [True] * 3) for saved in (pre, empty)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_rows_do_not_depend_on_their_batch(card, dtype):
    _, weight, bias, _ = operands(1, 200, 96, dtype)
    texts = [normal(n, 96, like=f"text {n}").to(dtype) for n in (1, 30, 17, 65, 2)]
    with cards.imitate(card):
        together, _ = linear_gelu.linear_gelu(torch.cat(texts[::-1]), weight, bias)
        parts = together.split([len(t) for t in texts[::-1]])[::-1]
        for text, part in zip(texts, parts, strict=True):
            assert torch.equal(linear_gelu.linear_gelu(text, weight, bias)[0], part)


def test_no_launch_without_tokens(monkeypatch):
    monkeypatch.setattr(linear_gelu, "linear_gelu_kernel", None)
    monkeypatch.setattr(linear_gelu, "gelu_backward_kernel", None)
    x, weight, grad = torch.empty(0, 8), torch.empty(16, 8), torch.empty(0, 16)
    assert [t.shape for t in linear_gelu.linear_gelu(x, weight, None, "none", True)] == [(0, 16), (0, 16)]
    found = linear_gelu.linear_gelu_backward(grad, x, weight, None, x.new_empty(0), "none", [True] * 3)
    assert [t.shape for t in found] == [(0, 8), (16, 8), (16,)]
    assert not any(t.any() for t in found)


def test_refusals_in_words():
    x, weight, bias, grad = operands(3, 16, 8, torch.float32)
    pre = grad.double()
    assert linear_gelu.linear_gelu_reasons(x, weight, bias) == []
    assert linear_gelu.linear_gelu_reasons(x, object()) == ["the weight is packed for a CPU"]
    reasons = linear_gelu.linear_gelu_backward_reasons(grad, x, weight, bias, pre, "none", [True] * 3)
    assert len(reasons) == 1 and "pre is torch.float64" in reasons[0]


PLANTED = {
    "the right half gets the left half's bias": (
        "with_bias(right, BIAS, columns, N)", "with_bias(right, BIAS, columns - BLOCK_N // 2, N)", "y"
    ),
    "tanh for erf": ("gelu(pre, APPROXIMATE, Y", 'gelu(pre, "tanh", Y', "y"),
    "y saved for pre": ("store_rows(pre, PRE", 'store_rows(gelu(pre, "none", Y.dtype.element_ty), PRE', "pre"),
    "the slope of tanh": ("gelu_slope(pre, APPROXIMATE", 'gelu_slope(pre, "tanh"', "x_grad"),
    "db without the last rows": ("total += dpre", "total = dpre", "bias_grad"),
    "a partial sum of db is left out": ("sum_of_parts(parts, pre", "sum_of_parts(parts[1:], pre", "bias_grad"),
    "pre computed again without its bias": ("else multiplied(x, weight, bias)", "else multiplied(x, weight, None)", ""),
}  # fmt: skip


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, tmp_path):
    old, new, shown = PLANTED[error]
    module = planted("linear_gelu", old, new, tmp_path)
    dtype = torch.bfloat16 if "half" in error else torch.float32  # fp32's tiles are stored whole
    with cards.imitate(OLD):
        if shown:
            assert ratios(module, (200, 136, 40), dtype, "none")[shown] > 1
            return
        x, weight, bias, grad = operands(20, 16, 8, torch.float32)
        call = grad, x, weight, bias, x.new_empty(0), "none", [True] * 3
        expected = linear_gelu.linear_gelu_backward(*call)
        assert not any(torch.equal(a, b) for a, b in zip(module.linear_gelu_backward(*call), expected, strict=True))
