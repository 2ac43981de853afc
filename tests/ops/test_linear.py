from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import LINEAR as SPEC
from tests.ops.every_op import *  # noqa: F403


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        ((3, 4, 1), (5, 4), (5,), r"x has shape \[3, 4, 1\], expected \[any, any\]"),
        ((3, 4), (5, 6), (5,), r"weight has shape \[5, 6\], expected \[any, 4\]"),
        ((3, 4), (5, 4), (4,), r"bias has shape \[4\], expected \[5\]"),
    ],
)
def test_wrong_shapes_are_named(x, weight, bias, words):
    with pytest.raises(ValueError, match=words):
        ops.linear(torch.ones(x), torch.ones(weight), torch.ones(bias))


def test_two_dtypes_are_refused(dtype):
    if dtype != torch.float32:
        with pytest.raises(ValueError, match=f"x is {dtype} and weight is torch.float32"):
            ops.linear(torch.ones(3, 4, dtype=dtype), torch.ones(5, 4))


def test_autocast_is_off_inside(backend):
    x, weight = torch.ones(3, 8, device=backend.device), torch.ones(5, 8, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        weight = backend.pack(weight) if backend.packed else weight
        assert backend(SPEC, (x, weight, None))[0].dtype == torch.float32
