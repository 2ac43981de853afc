from __future__ import annotations

import pytest
import torch

from fastbert import ops
from tests.ops.cases import CASES, cast
from tests.ops.cases import ENCODER_FORWARD as SPEC
from tests.ops.inference_op import *  # noqa: F403 - its tests are this module's


def arguments(**changes):
    (_, call), *_ = SPEC.inputs(CASES[0], torch.float32)
    names = "x", "cu_seqlens", "max_seqlen", "tensors", "heads", "scale", "eps", "approximate"
    return dict(zip(names, cast(call, torch.float32), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensors": []}, "there are 0 tensors, expected 28 a layer"),
        ({"tensors": [torch.ones(3)] * 29}, "there are 29 tensors, expected 28 a layer"),
        ({"approximate": "erf"}, "approximate is 'erf', expected 'none'"),
        ({"x": torch.ones(3)}, r"x has shape \[3\], expected \[any, any\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens is torch.int64, expected int32"),
    ],
)
def test_what_is_wrong_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ops.encoder_forward(**arguments(**changes))


def test_it_is_for_inference():
    call = arguments()
    with pytest.raises(NotImplementedError, match="encoder_forward cannot be differentiated: it is for inference"):
        ops.encoder_forward(**call | {"x": call["x"].requires_grad_()}).sum().backward()
