from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import EMBED_LAYER_NORM as SPEC
from tests.ops.cases import cast
from tests.ops.common import EDGES
from tests.ops.every_op import *  # noqa: F403

del test_other_sequences_do_not_matter, test_other_sequences_get_no_gradient  # noqa: F821


def call(**changes):
    _, exact = next(iter(SPEC.inputs(EDGES, torch.float32)))
    arguments = dict(zip(SPEC.op.arguments(), cast(exact, torch.float32), strict=False)) | changes
    return ops.embed_layer_norm(**arguments)


def test_a_row_is_a_function_of_its_token_alone(dtype, backend):
    """A token's row does not depend on the others, nor on the table's other rows, here NaN."""
    _, exact = next(iter(SPEC.inputs(EDGES, dtype)))
    ids, types, positions, words, *rest = cast(exact, dtype, backend.device)
    before, *_ = backend(SPEC, (ids, types, positions, words, *rest))
    poisoned = words.clone()
    poisoned[28] = torch.nan
    after, *_ = backend(SPEC, (ids, types, positions, poisoned, *rest))
    assert torch.equal(before[ids != 28], after[ids != 28])
    assert after[ids == 28].isnan().all()


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
