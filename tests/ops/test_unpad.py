from __future__ import annotations

import itertools

import pytest
import torch

from fastbert import layers, native, ops
from tests.ops.cases import CASES, DEVICES, NO_TOKENS
from tests.ops.common import names_here


def right_padded(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


MASKS = {str(case): right_padded(case.lengths) for case in CASES} | {
    "left padding": right_padded((3, 17, 1)).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 1]]) != 0,
    "nothing real": torch.zeros(3, 5, dtype=torch.bool),
    "nothing padded": torch.ones(3, 65, dtype=torch.bool),
    "no columns": torch.zeros(3, 0, dtype=torch.bool),
    "no rows": torch.zeros(0, 5, dtype=torch.bool),
    "many rows": right_padded(tuple(i % 33 for i in range(700))),
    "wide": right_padded((5000, 1, 4097)),
    str(NO_TOKENS): torch.zeros(2, 4, dtype=torch.bool),
}
BACKENDS = [(name, device) for device in DEVICES for name in names_here(ops.unpad, device)]


def run(backend, mask):
    name, device = backend
    if name in ("cpu", "cuda") and (reasons := native.refuse(device)):
        pytest.skip("; ".join(reasons))
    with ops.use_backend(name):
        found = ops.unpad(mask.to(device))
    assert [x.dtype for x in found] == [torch.int64, torch.int32, torch.int32]
    assert {x.device.type for x in found} == {device}
    return tuple(x.tolist() for x in found)


def by_hand(mask):
    rows = mask.tolist()
    width = mask.shape[1]
    indices = [i * width + j for i, row in enumerate(rows) for j, real in enumerate(row) if real]
    lengths = [sum(row) for row in rows]
    return indices, [0, *itertools.accumulate(lengths)], sorted(range(len(rows)), key=lambda i: -lengths[i])


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_against_plain_python(mask, backend):
    assert run(backend, mask) == by_hand(mask)


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
     torch.float32, torch.float64],
    ids=str,
)  # fmt: skip
def test_nonzero_is_real_in_any_dtype(dtype, backend):
    """HuggingFace attends wherever the mask is not zero: 2, 0.5 and -1 too."""
    values = torch.tensor([[1, 2, 0, 0.5], [-1, 0, 0, 3], [0, 0, 0, 0]])
    mask = values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)
    assert run(backend, mask) == by_hand(mask != 0)


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
def test_negative_zero_is_padding_and_nan_is_real(backend):
    assert run(backend, torch.tensor([[1.0, -0.0, torch.nan, 0.0]])) == ([0, 2], [0, 2], [0])


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_strided_masks(dtype, backend):
    mask = right_padded((3, 17, 1, 9)).to(dtype)
    views = {
        "every second": mask[:, ::2],
        "transposed": mask.T,
        "expanded": mask[:1].expand(5, -1),
        "inner": mask[1:3, 2:9],
    }
    for view in views.values():
        assert run(backend, view) == by_hand(view != 0)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"mask has shape \[2, 3, 4\], expected \[any, any\]"):
        ops.unpad(torch.ones(2, 3, 4))


@pytest.mark.parametrize("mask", [MASKS["edges"], MASKS["nothing real"], MASKS["many rows"].long()])
def test_opcheck(mask):
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastbert.unpad.default, (mask,), test_utils=tests)


def test_one_read_tells_the_host_everything():
    """What a GPU's host reads of a mask at once, and the indices that it then makes without waiting."""
    for first in (0, 3):
        mask = torch.tensor([[1, 1, 1, 0], [first, 0, 2, 0], [1, 0, 0, 0]])
        indices, *_ = by_hand(mask)
        assert layers.measure(mask) == (len(indices), 3, bool(first), (3, 0, 0, 0, 0))
        assert ops.unpad.backends["torch"].run(mask, len(indices))[0].tolist() == indices


def test_rows_are_counted_by_class_of_length():
    lengths = (0, 64, 65, 128, 129, 256, 257, 512, 513, 3, 600)
    tokens, longest, _, classes = layers.measure(right_padded(lengths))
    assert (tokens, longest) == (sum(lengths), 600)
    assert classes == (3, 2, 2, 2, 2)
