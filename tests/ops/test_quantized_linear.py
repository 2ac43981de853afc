"""The int8 product: the shared tests, its integers bit for bit, rows that keep to themselves, words."""

from __future__ import annotations

import pytest
import torch

from fastbert import ops, torch_private
from fastbert.ops import builtins, reference
from tests.ops.cases import CASES, cast, normal
from tests.ops.cases import QUANTIZED_LINEAR as SPEC
from tests.ops.inference_op import *  # noqa: F403 - its tests are this module's

EDGES = CASES[0]
COLUMNS = torch.tensor([5, 0])


def rows_at_the_edges(columns: int = 37) -> torch.Tensor:
    """[T, K] fp32: ordinary rows, zeros, outliers, one sign, halves between two steps, the smallest, the greatest."""
    x = normal(12, columns, like="edges").float()
    x[1], x[2, 3], x[3, 7] = 0, 1e4, -1e4
    x[4], x[5] = x[4].abs(), -x[5].abs()
    x[6] = torch.arange(columns) / 2  # of steps of 1: half of them are ties
    x[6, -1] = 127
    x[7], x[8], x[9] = x[7] * 1e-40, x[8] * 1e37, 2.0**-149
    x[10, 0], x[11, 1] = torch.nan, torch.inf
    return x


@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["all", "columns of outliers"])
@pytest.mark.parametrize(("wide", "rotated"), [(37, 1), (48, 16), (384, 128)])
def test_the_integers_are_the_references(columns, wide, rotated):
    """Steps and scales are bitwise those of the specification; the built-in keeps steps 128 less."""
    x = rows_at_the_edges(wide)
    steps, scale = reference.quantize_rows(x, columns, rotated)
    ours, ours_scale = builtins.quantize_rows(x, columns, rotated)
    assert torch.equal(ours.int() + 128, steps.int())
    assert torch.equal(ours_scale.view(torch.int32), scale.view(torch.int32))


def test_a_row_is_what_its_steps_stand_for():
    """Each value lies within half a step; zeros stay zeros; the greatest magnitude takes 127 steps."""
    x = rows_at_the_edges()[:7]
    steps, scale = reference.quantize_rows(x)
    found = (steps.double() - 128) * scale.double()[:, None]
    assert ((found - x.double()).abs() / scale.double()[:, None]).max() <= 0.5001
    assert (steps[x == 0] == 128).all()
    assert ((steps.int() - 128).abs().amax(1) == torch.tensor([127, 0, 127, 127, 127, 127, 127])).all()


def test_a_rotation_is_hadamards():
    x = torch.eye(8).repeat(1, 2)
    once = reference.rotate(x, 8)
    assert once[0].tolist() == [1.0] * 16 and once[5, :8].tolist() == [1, -1, 1, -1, -1, 1, -1, 1]
    assert torch.equal(reference.rotate(once, 8), 8 * x) and torch.equal(builtins.rotate(x, 8), once)
    assert torch.equal(reference.rotate(x, 1), x)


def test_the_integer_product_is_exact(monkeypatch):
    """Also where every product is the largest, by torch's int8 product and by sums in fp32."""
    x = torch.full((3, 4096), -128, dtype=torch.int8)
    weight = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, 4096).contiguous()
    x[1:, ::2], weight[:, 1::3] = 127, 126
    wanted = (x.double() @ weight.double().T).tolist()
    assert builtins.integer_product(x, weight).tolist() == wanted
    monkeypatch.setattr(torch_private, "integer_product_refusal", lambda: "not here")
    assert builtins.integer_product(x, weight).tolist() == wanted


def test_rows_that_are_not_finite_are_nan_and_alone(plain_backend):
    """NaN and infinity make their own rows NaN; 1e37 stays finite."""
    x, weight = rows_at_the_edges(), normal(9, 37, like="w").mul(40).to(torch.int8)
    (y,) = plain_backend(SPEC, tuple(t.to(plain_backend.device) for t in (x, weight, torch.full((9,), 0.01))))
    assert y[10:].isnan().all() and y[:10].isfinite().all()


@pytest.mark.parametrize("alone", [slice(0, 1), slice(1, 3), slice(60, 70), slice(5, 200)], ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(plain_backend, alone):
    for _, (x, *rest) in SPEC.inputs(EDGES, torch.float32):
        x, *arguments = cast((x, *rest), torch.float32, plain_backend.device)
        (whole,), (part,) = (plain_backend(SPEC, (rows, *arguments)) for rows in (x, x[alone]))
        if plain_backend.name != "reference":  # whose sums are in float64, in the library's order
            assert torch.equal(whole[alone], part)
        torch.testing.assert_close(whole[alone], part)


def test_a_gradient_is_refused_in_words():
    x = torch.ones(2, 4, requires_grad=True)
    y = ops.quantized_linear(x, torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    with pytest.raises(
        NotImplementedError, match=r"int8 products are for inference: train the model before fastbert\."
    ):
        y.sum().backward()


INT8, ONES = torch.ones(3, 4, dtype=torch.int8), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((INT8.float(), ONES), r"weight is torch.float32, expected int8"),
        ((INT8, ONES[:2]), r"scales has shape \[2\], expected \[3\]"),
        ((INT8, ONES, ONES[:1]), r"bias has shape \[1\], expected \[3\]"),
        ((INT8, ONES, None, COLUMNS[:1]), r"columns and outliers are given together or not at all"),
        ((INT8, ONES, None, COLUMNS, torch.ones(3, 1)), r"outliers has shape \[3, 1\], expected \[3, 2\]"),
        ((INT8, ONES, None, COLUMNS.float(), torch.ones(3, 2)), r"columns is torch.float32, expected int64"),
        ((INT8, ONES, None, COLUMNS, torch.ones(3, 2)), r"outliers is torch.float32, expected bfloat16"),
        ((INT8, ONES, None, None, None, 3), r"rotated is 3, expected a power of two that divides 4"),
        ((INT8, ONES, None, None, None, 8), r"rotated is 8, expected a power of two that divides 4"),
        ((INT8, ONES, None, None, None, 1, "erf"), r"activation is 'erf', expected '', 'none' \(erf GELU\) or 'tanh'"),
        ((INT8, ONES.int()), r"scales is torch.int32, no float"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        ops.quantized_linear(torch.ones(2, 4), *arguments)
