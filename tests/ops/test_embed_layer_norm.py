from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import EMBED_LAYER_NORM as SPEC
from tests.ops.cases import cast
from tests.ops.common import (  # noqa: F401
    EDGES,
    test_a_gradient_is_refused_in_words,
    test_dtypes_and_shapes,
    test_gradcheck_of_the_reference,
    test_inputs_are_not_written,
    test_opcheck,
    test_parity,
    test_reference_is_the_formula,
    test_reruns_are_bitwise_equal,
    test_strided_inputs,
)


def call(**changes):
    names = ("ids", "types", "positions", "words", "type_table", "position_table", "gamma", "beta", "eps", "p")
    _, exact = next(iter(SPEC.inputs(EDGES, torch.float32)))
    arguments = dict(zip(names, (*cast(exact, torch.float32), 0.0), strict=True)) | changes
    return ops.embed_layer_norm(*arguments.values())


def test_a_row_is_a_function_of_its_token_alone(dtype, backend):
    """A token's row does not depend on the others, nor on the table's other rows, here NaN."""
    _, exact = next(iter(SPEC.inputs(EDGES, dtype)))
    ids, types, positions, words, *rest = cast(exact, dtype, backend.device)
    (before,) = backend(SPEC, (ids, types, positions, words, *rest))
    poisoned = words.clone()
    poisoned[28] = torch.nan
    (after,) = backend(SPEC, (ids, types, positions, poisoned, *rest))
    assert torch.equal(before[ids != 28], after[ids != 28])
    assert after[ids == 28].isnan().all()


def test_hidden_dropout_is_refused_in_words():
    with pytest.raises(
        ops.BackendRefused, match=r"hidden dropout p = 0\.1 needs the op dropout_bits, which no backend has"
    ):
        call(p=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"ids has shape \[2, 2\], expected \[any\]"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions has shape \[2\], expected \[496\]"),
        ({"ids": torch.zeros(496)}, "ids is torch.float32, expected int64 or int32"),
        ({"type_table": None}, "types are given without a type_table"),
        ({"position_table": torch.zeros(512, 3)}, r"position_table has shape \[512, 3\], expected \[any, 64\]"),
        ({"gamma": torch.zeros(3), "beta": torch.zeros(2)}, r"gamma has shape \[3\].*beta has shape \[2\]"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        call(**changes)
