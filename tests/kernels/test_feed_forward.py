"""feed_forward: GELU's gradient in the epilogue of the second product's backward, on sm_80's and sm_90's paths."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from benchmarks import stock
from fastbert.parity import judge
from tests import interpreter

if not interpreter.is_here():
    pytest.skip("Triton's interpreter is not here", allow_module_level=True)

from fastbert.kernels import cards, feed_forward, linear, linear_gelu

from fastbert.ops import reference
from tests.kernels.test_linear import EVERY, NEW, OLD, planted
from tests.ops.cases import normal

NAMES = ("x_grad", "w1_grad", "b1_grad", "w2_grad", "b2_grad")


def operands(tokens: int, hidden: int, wide: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A gradient, x, w1, b1, w2, b2."""
    shapes = (tokens, hidden), (tokens, hidden), (wide, hidden), (wide,), (hidden, wide), (hidden,)
    scales = 1, 1, hidden**-0.5, 0.5, wide**-0.5, 0.5
    pairs = enumerate(zip(shapes, scales, strict=True))
    return tuple(normal(*shape, like=f"operand {i}", scale=scale).to(dtype) for i, (shape, scale) in pairs)


def ratios(module: ModuleType, size: tuple[int, int, int], dtype: torch.dtype, approximate: str) -> dict[str, float]:
    """How each result of the module's forward and backward is judged; size: tokens, hidden, wide."""
    grad, *arguments = operands(*size, dtype)
    x, w1, b1, w2, _ = arguments
    y, pre = module.feed_forward(*arguments, approximate, True)
    ours = module.feed_forward_backward(grad, x, w1, b1, w2, pre, approximate, [True] * 5)
    wide = [t.double() for t in arguments]
    ref, _ = reference.feed_forward(*wide, approximate)
    found = {"y": judge(y, ref, stock.feed_forward(*arguments, approximate)).ratio}
    pre = wide[0] @ wide[1].T + wide[2]
    exact = reference.feed_forward_backward(grad.double(), *wide[:4], pre, approximate, [True] * 5)
    base = stock.gradients(lambda *a: stock.feed_forward(*a, approximate), arguments, range(5), grad)
    return found | {n: judge(*tensors).ratio for n, *tensors in zip(NAMES, ours, exact, base, strict=True)}


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(
    ("size", "approximate"),
    [
        pytest.param((140, 72, 264), "none", id="several tiles a program, a rest of each size"),
        pytest.param((40, 33, 35), "tanh", id="rows that wide loads cannot read"),
    ],
)
def test_both_directions(card, dtype, size, approximate, poisoned):
    with cards.imitate(card):
        for name, ratio in ratios(feed_forward, size, dtype, approximate).items():
            assert ratio <= 1, f"{name}: {ratio}"


@pytest.mark.parametrize("card", [pytest.param(OLD, marks=pytest.mark.slow), NEW], ids=str)
def test_whatever_is_needed_has_the_same_bits(card, poisoned):
    """Each gradient alone, w2's and b2's without the others, none; pre saved or computed again."""
    grad, x, w1, b1, w2, b2 = operands(70, 24, 136, torch.bfloat16)
    choices = [*([i == j for i in range(5)] for j in range(5)), [False] * 3 + [True] * 2, [False] * 5]
    with cards.imitate(card):
        _, pre = feed_forward.feed_forward(x, w1, b1, w2, b2, "none", True)
        full = feed_forward.feed_forward_backward(grad, x, w1, b1, w2, pre, "none", [True] * 5)
        for count, needed in enumerate(choices):
            saved = pre if count % 2 else x.new_empty(0)
            found = feed_forward.feed_forward_backward(grad, x, w1, b1, w2, saved, "none", needed)
            for wanted, ours, expected in zip(needed, found, full, strict=True):
                assert torch.equal(ours, expected) if wanted else ours.shape == (0,)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_rows_do_not_depend_on_their_batch(dtype):
    _, _, *weights = operands(1, 40, 200, dtype)
    texts = [normal(n, 40, like=f"text {n}").to(dtype) for n in (3, 64, 1, 29)]
    with cards.imitate(NEW):
        together, _ = feed_forward.feed_forward(torch.cat(texts), *weights)
        for text, part in zip(texts, together.split([len(t) for t in texts]), strict=True):
            assert torch.equal(feed_forward.feed_forward(text, *weights)[0], part)


def test_no_launch_without_tokens(monkeypatch):
    for module in (linear, linear_gelu, feed_forward):
        for name in dir(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, None)
    grad, x, w1, b1, w2, b2 = operands(0, 8, 16, torch.float32)
    y, pre = feed_forward.feed_forward(x, w1, b1, w2, b2, "none", True)
    assert (y.shape, pre.shape) == ((0, 8), (0, 16))
    for needed in ([True] * 5, [False, False, False, True, False]):
        found = feed_forward.feed_forward_backward(grad, x, w1, b1, w2, pre, "none", needed)
        assert not any(t.any() for t in found)
        shapes = [t.shape if wanted else (0,) for t, wanted in zip((x, w1, b1, w2, b2), needed, strict=True)]
        assert [t.shape for t in found] == shapes


def test_refusals_in_words():
    grad, x, w1, b1, w2, b2 = operands(3, 8, 16, torch.float32)
    assert feed_forward.feed_forward_reasons(x, w1, b1, w2, b2) == []
    assert feed_forward.feed_forward_reasons(x, w1, b1, object(), b2) == ["the weight is packed for a CPU"]
    call = x, w1, b1, w2, x.new_empty(0), "none", [True] * 5
    assert feed_forward.feed_forward_backward_reasons(grad, *call) == []
    assert "grad is torch.float64" in feed_forward.feed_forward_backward_reasons(grad.double(), *call)[0]


PLANTED = {
    "a half's slope of other columns": (
        "    columns += COLUMNS // 2\n    store_inner_grad(right, PRE",
        "    columns += COLUMNS // 2\n    store_inner_grad(left, PRE",
        "w1_grad",
    ),
    "db1 without the last rows of tiles": ("sum_of_parts(parts, pre", "sum_of_parts(parts[:-1], pre", "b1_grad"),
    "db1 of the upstream gradient": ("tl.sum(dpre, 0)", "tl.sum(dinner, 0)", "b1_grad"),
    "dGELU by tanh": ("gelu_slope(pre, APPROXIMATE", 'gelu_slope(pre, "tanh"', "x_grad"),
    "dW2 of the pre-activation": ("gelu(pre, APPROXIMATE, INNER.dtype.element_ty), INNER", "pre, INNER", "w2_grad"),
    "dW2 of the gradient of the inner rows": ("weight_grad(grad, inner)", "weight_grad(grad, dpre)", "w2_grad"),
    "db2 of the wrong tensor": ("sum_of_rows(grad)", "sum_of_rows(x)", "b2_grad"),
    "the second product without its bias": ("linear(inner, w2, b2)", "linear(inner, w2, None)", "y"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, tmp_path):
    old, new, shown = PLANTED[error]
    with cards.imitate(OLD):
        assert ratios(planted("feed_forward", old, new, tmp_path), (140, 40, 136), torch.float32, "none")[shown] > 1
