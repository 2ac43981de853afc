"""The products of packed weights and the encoder by every instruction set: shapes around tiles and panels, threads."""

from __future__ import annotations

import time

import pytest
import torch

from fastbert import native, ops
from fastbert.ops import cpu, packing, reference
from fastbert.ops.packed import PANEL, from_panels, panels_of
from fastbert.parity import judge
from tests.ops.cases import (
    CASES,
    DTYPES,
    ENCODER_FORWARD,
    FEED_FORWARD,
    LINEAR,
    LINEAR_GELU,
    QUANTIZED_LINEAR,
    cast,
    gelu_inputs,
    normal,
)
from tests.ops.common import Backend, arguments_of, as_tuple, judged
from tests.ops.test_isas import isa, library  # noqa: F401

CPU = Backend("cpu", "cpu", packed=True)
QUICK = ("edges", "one", "odd", "narrow")
SOME = [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
THREADS = 1, 2, 3, 8
SPECS = [LINEAR, LINEAR_GELU, FEED_FORWARD, ENCODER_FORWARD, QUANTIZED_LINEAR]
# rows around the heights of tiles (6 and 14) and tasks (112); N around vectors and panels; K around words, steps of 64
# words and what is packed at once
SHAPES = [
    (1, 1, 1), (5, 31, 3), (6, 32, 64), (7, 33, 65), (13, 8, 127), (14, 64, 128), (15, 96, 129), (29, 40, 191),
    (111, 17, 257), (112, 16, 16), (113, 15, 2), (225, 100, 300), (112, 16, 2048), (3, 50, 3072), (30, 20, 9001),
]  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_by_every_instruction_set(spec, case, dtype, parity):
    for check, tensors in judged(spec, case, dtype, CPU):
        parity(*tensors[:3], name=check, elementwise=tensors[3])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_every_value(dtype, approximate, parity):
    """All values of 16 bits, judged per binade."""
    exact = gelu_inputs(dtype, approximate)
    ours = CPU(LINEAR_GELU, arguments_of(LINEAR_GELU, exact, dtype, CPU))[0]
    rounded = cast(exact, dtype)
    ref = LINEAR_GELU.reference(*cast(rounded, torch.float64))[0]
    base = as_tuple(LINEAR_GELU.stock(*rounded))[0]
    parity(ours, ref, base, name=f"gelu/cpu/{approximate}", elementwise=True)


def call(rows, columns, inner, dtype):
    """x, weight and bias of a product."""
    shape = f"{rows} {columns} {inner}"
    x, weight = normal(rows, inner, like=f"x {shape}"), normal(columns, inner, like=f"w {shape}", scale=inner**-0.5)
    return cast((x, weight, normal(columns, like=f"b {shape}", scale=0.1)), dtype)


def product(x, weight, bias):
    return cpu.linear(x, cpu.pack_weight(weight), bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_around_tiles_and_panels(shape, dtype):
    x, weight, bias = call(*shape, dtype)
    exact = x.double() @ weight.double().T + bias.double()
    step = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(product(x, weight, bias).double(), exact, rtol=step, atol=step)
    strided = torch.stack([x, x.new_full(x.shape, torch.nan)], 2)[..., 0]
    assert torch.equal(product(strided, weight, bias), product(x, weight, bias))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 65), (14, 64, 128), (15, 32, 131), (30, 40, 3072)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_those_of_the_reference(shape, dtype):
    """With weights that pick one column each, what comes out is a row's bytes, times its scale."""
    inner = shape[2]
    x, _, _ = call(*shape, dtype)
    x[0, 0], x[-1, -1] = 300, -0.5  # halves, once the greatest is 127 steps
    columns, outliers = torch.tensor([inner // 2]), torch.zeros(inner, 1, dtype=torch.bfloat16)
    weight, scales, rotated = torch.eye(inner, dtype=torch.int8), torch.ones(inner), min(inner & -inner, 128)
    packed = cpu.pack_weight(weight), scales, None, columns, cpu.pack_weight(outliers), rotated
    bytes_of, scale = reference.quantize_rows(x, columns, rotated)
    expected = ((bytes_of.float() - 128) * scale[:, None]).to(dtype)
    assert torch.equal(cpu.quantized_linear(x, *packed), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("rows", [1, 15, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_outliers_are_multiplied_in_bf16(dtype, rows, count):
    """An even and an odd number of them, alone: x is 0 elsewhere, so that nothing comes from the bytes."""
    x, _, _ = call(rows, 40, 66, dtype)
    columns = torch.randperm(66)[:count].sort().values
    x = torch.zeros_like(x).index_copy_(1, columns, 100 * x[:, columns])
    weight, outliers = torch.full((40, 66), 127, dtype=torch.int8), torch.randn(40, count).bfloat16()
    arguments = cpu.pack_weight(weight), torch.ones(40), None, columns, cpu.pack_weight(outliers), 2
    large = x[:, columns].bfloat16().double()
    error = cpu.quantized_linear(x, *arguments).double() - large @ outliers.double().T
    assert (error.abs() <= 2 * torch.finfo(dtype).eps * (large.abs() @ outliers.double().abs().T)).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_has_the_same_bits(dtype):
    """Whatever stands beside it, NaN too, and however many rows a thread has."""
    x, weight, bias = call(225, 100, 300, dtype)
    together = product(x, weight, bias)
    for row in (0, 13, 111, 112, 224):
        assert torch.equal(product(x[row : row + 1], weight, bias)[0], together[row])
    x[100] = torch.nan
    beside = product(x, weight, bias)
    assert beside[100].isnan().all() and torch.equal(beside[:100], together[:100])
    assert torch.equal(beside[101:], together[101:])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("lengths", [(3, 9), (40, 0, 17), (130, 300, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(lengths, dtype):
    """Few rows share out the panels of a weight, many the rows; threads that were idle, and that were not."""
    case = CASES[0].__class__("threads", lengths, 2, 16, 200, "rows around a thread's")
    before, found = torch.get_num_threads(), []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            for spec in SPECS:
                for _, exact in spec.inputs(case, dtype):
                    arguments = arguments_of(spec, exact, dtype, CPU)
                    time.sleep(0.002)
                    idle, busy = CPU(spec, arguments), CPU(spec, arguments)
                    assert all(map(torch.equal, idle, busy))
                    found += [x for x in idle if x.numel()]
    finally:
        torch.set_num_threads(before)
    each = len(found) // len(THREADS)
    for alone, *others in zip(*(found[i : i + each] for i in range(0, len(found), each)), strict=True):
        assert all(torch.equal(alone, other) for other in others)


@pytest.mark.usefixtures("isa")
def test_layers_in_one_call_or_several_have_the_same_bits():
    _, (_, second) = ENCODER_FORWARD.inputs(CASES[0], torch.float32)
    x, cu_seqlens, longest, tensors, *rest = cast(second, torch.float32)
    packed = CPU.pack(tensors)
    with ops.use_backend("cpu"):
        together = ops.encoder_forward(x, cu_seqlens, longest, packed, *rest)
        one = ops.encoder_forward(x, cu_seqlens, longest, packed[: ops.LAYER_TENSORS], *rest)
        assert torch.equal(ops.encoder_forward(one, cu_seqlens, longest, packed[ops.LAYER_TENSORS :], *rest), together)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_over_many_columns_is_more_exact_than_pytorch(dtype):
    """Added up in parts."""
    if dtype != torch.float32:
        pytest.skip("16 bits are rounded once at the end")
    x, weight, _ = call(64, 64, 3072, dtype)
    exact = x.double() @ weight.double().T
    assert judge(product(x, weight, None), exact, x @ weight.T).rms_ratio < 0.7


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (32, 4), (33, 5), (64, 131)], ids=str)
def test_panels_and_back(kind, shape):
    weight = (torch.arange(shape[0] * shape[1]) % 100).view(shape).to(kind)
    panels = panels_of(weight)
    assert panels.shape[0] * PANEL >= shape[0] and panels.shape[2] == PANEL
    assert torch.equal(from_panels(panels, shape), weight)
    assert panels.double().sum() == weight.double().sum()  # zeros elsewhere


@pytest.mark.usefixtures("library")
def test_a_weight_is_packed_for_the_backend_that_is_chosen():
    device = torch.device("cpu")
    with ops.use_backend("torch"):
        assert packing.packer(device, torch.float32) == "torch"
    with ops.use_backend("reference"):
        assert packing.packer(device, torch.float32) == ""
        weight = torch.ones(3, 4)
        assert ops.pack_weight(weight) is not weight and torch.equal(ops.pack_weight(weight), weight)
    assert packing.packer(device, torch.float64) == ""
    with pytest.raises(ValueError, match="backend 'reference' packs no weights"):
        ops.pack_weight(torch.ones(3, 4), "reference")


def test_amx_and_no_avx2_leave_products_to_onednn(library, monkeypatch):  # noqa: F811
    monkeypatch.setattr(native, "has_amx", lambda: True)
    assert cpu.pack_reasons(torch.bfloat16) and not cpu.pack_reasons(torch.float32)
    monkeypatch.setattr(native, "has_amx", lambda: False)
    best = native.isa()
    try:
        native.limit_isa("baseline")
        assert cpu.pack_reasons(torch.float32) == ["without AVX2 its products are slower than oneDNN's"]
    finally:
        native.limit_isa(best)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda call: call.update(weight=[call["weight"][0][:1]]), "has another shape than"),
        (lambda call: call.update(weight=[call["weight"][0].double()]), "none of float32, bfloat16 and int8"),
        (lambda call: call.update(weight=call["weight"] * 2), "one tensor, or five of int8"),
        (lambda call: call.update(weight=[call["weight"][0].to(torch.int8)]), "has another shape than"),
        (lambda call: call.update(columns=700), "has another shape than"),
        (lambda call: call.update(bias=torch.ones(5)), "bias is not .N. in x's dtype"),
        (lambda call: call.update(bias=torch.ones(70).bfloat16()), "bias is not .N. in x's dtype"),
        (lambda call: call.update(x=torch.ones(3)), "x is not .T, K."),
        (lambda call: call.update(x=torch.ones(3, 8).double()), "none of float32, float16 and bfloat16"),
    ],
)
def test_the_library_refuses_what_does_not_fit(change, words):
    given = {"x": torch.ones(3, 8), "weight": [panels_of(torch.ones(70, 8))], "columns": 70, "bias": torch.ones(70)}
    change(given)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastbert_native.packed_linear(*given.values(), 0, 1)
