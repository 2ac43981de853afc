"""The kernels for CPUs by every instruction set that is here: widths around its vectors', any number of threads."""

from __future__ import annotations

import functools

import pytest
import torch

from fastbert import native, ops
from fastbert.ops import reference
from fastbert.ops.sample_calls import backward_arguments
from tests.ops.cases import ADD_LAYER_NORM, CASES, DTYPES, EMBED_LAYER_NORM, SEED, cast, normal
from tests.ops.common import Backend, as_tuple, judged
from tests.ops.gradients import judged_gradients

CPU = Backend("cpu", "cpu")
QUICK = ("edges", "one", "odd", "narrow")
SOME = [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
WIDTHS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 768, 1024)  # around 4, 8 and 16 lanes, draws of 16, 32 and 64
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
STEPS = {torch.float32: 2**-17, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture
def library():
    if reasons := native.refuse("cpu"):
        pytest.skip("; ".join(reasons))


# quick: the code without instructions of its own, and the widest
@pytest.fixture(params=[i if i in (native.ISAS[0], native.ISAS[-1]) else slow(i) for i in native.ISAS])
def isa(request, library):
    """Kernels for CPUs use this instruction set and no more."""
    best = native.isa()
    try:
        if native.limit_isa(request.param) != request.param:
            pytest.skip(f"no {request.param} in this library or this CPU")
        yield request.param
    finally:
        native.limit_isa(best)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("spec", [ADD_LAYER_NORM, EMBED_LAYER_NORM], ids=lambda spec: spec.op.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_by_every_instruction_set(spec, case, dtype, parity):
    for judge in (judged, judged_gradients):
        for check, tensors in judge(spec, case, dtype, CPU):
            parity(*tensors[:3], name=check, elementwise=tensors[3])


def add_arguments(rows, hidden, dtype, wide, p):
    """Arguments of add_layer_norm: x and bias in a dtype, residual and gains in another."""
    x, residual = normal(rows, hidden, like=f"x {hidden}"), normal(rows, hidden, like=f"residual {hidden}")
    bias, gamma, beta = (normal(hidden, like=f"{name} {hidden}") for name in ("bias", "gamma", "beta"))
    seed = torch.tensor(SEED) if p else None
    return *cast((x, bias), dtype), *cast((residual, gamma + 2, beta), wide), 1e-5, p, seed, 6


def embed_arguments(rows, hidden, dtype, p):
    """Arguments of embed_layer_norm whose ids meet again, with a padding row in both tables that have one."""
    words, types, positions = (normal(9, hidden, like=f"{name} {hidden}") for name in ("words", "types", "positions"))
    gamma, beta = normal(hidden, like=f"gamma {hidden}"), normal(hidden, like=f"beta {hidden}")
    ids = torch.arange(rows)
    seed = torch.tensor(SEED) if p else None
    tables = cast((words, types, positions, gamma + 2, beta), dtype)
    save = hidden > 2  # of one or two elements a rounded sum has another slope
    return ids * 5 % 7, ids % 2, ids.int() % 9, *tables, 1e-5, p, seed, 5, 3, save


def widened(arguments):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)


def run(op, arguments, grad):
    """The outputs of an op and, of its first output's gradient, those of its backward, by the kernels for CPUs."""
    found = as_tuple(op.backends["cpu"].run(*arguments))
    slopes = op.gradient.op.backends["cpu"].run(*backward_arguments(op, arguments, found, grad))
    return dict(zip((*op.returns(), *op.gradient.op.returns()), (*found, *slopes), strict=True))


def exact(op, arguments, grad):
    """As `run` by the reference, in float64."""
    arguments = widened(arguments)
    found = getattr(reference, op.name)(*arguments)
    slopes = getattr(reference, op.gradient.op.name)(*backward_arguments(op, arguments, found, grad.double()))
    return dict(zip((*op.returns(), *op.gradient.op.returns()), (*found, *slopes), strict=True))


def check_near(op, arguments):
    grad = normal(*as_tuple(op.fake(*arguments))[0].shape, like="grad").to(arguments[4].dtype)
    expected = exact(op, arguments, grad)
    for name, ours in run(op, arguments, grad).items():
        if not ours.numel():
            continue  # what was not to be saved
        step = max(STEPS[ours.dtype], STEPS[torch.float32] * 4 if name.endswith("_grad") else 0)
        near = {"rtol": step, "atol": step * max(1.0, float(expected[name].abs().max()))}
        torch.testing.assert_close(ours.double(), expected[name], **near, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_around_those_of_vectors(hidden, dtype):
    for p in (0.0, 0.5):
        for wide in {dtype, torch.float32}:
            check_near(ops.add_layer_norm, add_arguments(5, hidden, dtype, wide, p))
        check_near(ops.embed_layer_norm, embed_arguments(5, hidden, dtype, p))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("hidden", [33, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(hidden, dtype):
    rows = 200_000 // hidden + 3
    calls = [(ops.add_layer_norm, add_arguments(rows, hidden, dtype, dtype, 0.1))]
    calls.append((ops.embed_layer_norm, embed_arguments(rows, hidden, dtype, 0.1)))
    for op, arguments in calls:
        grad = normal(rows, hidden, like="grad").to(dtype)
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(op, arguments, grad))
        finally:
            torch.set_num_threads(before)
        for name, alone in found[0].items():
            assert torch.equal(alone, found[1][name]) and torch.equal(alone, found[2][name]), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("hidden", [7, 100])
def test_what_is_added_up_over_many_rows(hidden):
    """Sums over 5,000 rows, all to one row of a table: as near as the float64 sum of the rows' own gradients."""
    rows = 5000
    *_, words, types, positions, gamma, beta, eps, p, seed, _, _, _ = embed_arguments(1, hidden, torch.float32, 0.0)
    zeros = torch.zeros(rows, dtype=torch.int64)
    arguments = zeros, zeros, zeros, words, types, positions, gamma, beta, eps, p, seed, -1, -1, False
    grad = normal(rows, hidden, like="grad").float()
    found, expected = (f(ops.embed_layer_norm, arguments, grad) for f in (run, exact))
    for name in ("words_grad", "type_table_grad", "position_table_grad", "gamma_grad", "beta_grad"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 1, 40, 99])
@pytest.mark.parametrize("value", [1e6, 3e38, torch.nan, torch.inf], ids=str)
def test_one_element_far_from_the_others(place, value):
    """Mean and variance in one pass lose nothing to an outlier; what is not finite stays in its row."""
    x, bias, residual, gamma, beta, *rest = add_arguments(3, 100, torch.float32, torch.float32, 0.0)
    residual[1, place] = value
    y, mean, rstd = ops.add_layer_norm.backends["cpu"].run(x, bias, residual, gamma, beta, *rest)
    expected = reference.add_layer_norm(*widened((x, bias, residual, gamma, beta)), *rest)
    for ours, ref in zip((y, mean, rstd), expected, strict=True):
        if abs(value) <= 3e38:
            torch.testing.assert_close(ours.double(), ref, rtol=1e-5, atol=1e-5)
        else:
            assert ours[1].isnan().all() or (ours is mean and ours[1] == value)
            torch.testing.assert_close(ours[::2].double(), ref[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
def test_a_mean_far_from_zero():
    x, bias, residual, gamma, beta, *rest = add_arguments(9, 100, torch.float32, torch.float32, 0.0)
    arguments = x, bias, residual + 2.0**20, gamma, beta, *rest
    _, mean, rstd = ops.add_layer_norm.backends["cpu"].run(*arguments)
    total = (x + bias + arguments[2]).double()  # as fp32 holds it
    torch.testing.assert_close(mean.double(), total.mean(1), rtol=2**-24, atol=0)
    torch.testing.assert_close(rstd.double(), (total.var(1, correction=0) + 1e-5) ** -0.5, rtol=2**-23, atol=0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("outside", [-1, 9, 2**31 - 1])
def test_indices_outside_a_table_are_refused_as_pytorch_does(kind, which, outside):
    arguments = list(embed_arguments(5, 8, torch.float32, 0.0))
    good = ops.embed_layer_norm(*arguments)
    backward = list(backward_arguments(ops.embed_layer_norm, tuple(arguments), good, torch.ones(5, 8)))
    wrong = arguments[which].to(kind).clone()
    wrong[3] = outside
    arguments[which] = backward[which + 1] = wrong
    for backend in ("cpu", "torch"):
        with pytest.raises(IndexError, match="index out of range in self"):
            ops.embed_layer_norm.backends[backend].run(*arguments)
    with pytest.raises(IndexError, match="index out of range in self"):
        ops.embed_layer_norm.gradient.op.backends["cpu"].run(*backward)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64, "wide": torch.float64}, "x is torch.float64: it takes float32, float16 and bfloat16"),
        ({"dtype": torch.float32, "wide": torch.float16}, "x is torch.float32 beside a residual of torch.float16"),
        ({"hidden": 0}, "hidden size is 0"),
    ],
)
def test_what_is_not_taken_is_refused_in_words(changes, words):
    given = {"rows": 3, "hidden": 8, "dtype": torch.float32, "wide": torch.float32, "p": 0.0} | changes
    with ops.use_backend("cpu"), pytest.raises(ops.BackendRefused, match=words):
        ops.add_layer_norm(*add_arguments(**given))


@pytest.mark.usefixtures("library")
def test_the_limit_is_obeyed_and_lifted():
    best = native.isa()
    try:
        assert native.limit_isa("baseline") == native.isa() == "baseline"
    finally:
        assert native.limit_isa(best) == native.isa() == best
