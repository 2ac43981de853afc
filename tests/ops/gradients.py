"""The tests of its backward that every differentiable op has. A test file imports those it wants, as of common.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch

from benchmarks import stock
from fastbert import ops
from fastbert.ops.sample_calls import backward_arguments
from fastbert.parity import judge
from tests.ops.cases import NO_TOKENS, SPECS, Arguments, Case, Spec, cast, gelu_inputs, normal
from tests.ops.common import Backend, as_tuple, strided

SMALL = Case("small", (3, 0, 1), 2, 4, 5, "small enough for numeric gradients; an empty row")
FEW = 64  # numbers: of a smaller gradient the largest error says little
Gradients = dict[str, torch.Tensor]  # by name: x_grad, weight_grad, ...


def names_of(spec: Spec, arguments: Arguments) -> list[str]:
    """The gradients that these arguments have: of what is None, none."""
    return [f"{spec.op.arguments()[i]}_grad" for i in stock.differentiated(spec.op, arguments)]


def upstream(spec: Spec, arguments: Arguments, dtype: torch.dtype, name: str = "") -> torch.Tensor:
    """A gradient for the first output, rounded to the dtype; small where LayerNorm's 1/σ would carry it out of fp16."""
    shape, scale = as_tuple(spec.op.fake(*arguments))[0].shape, {"zeros": 2**-10, "small variance": 2**-4}.get(name, 1)
    return normal(*shape, like=f"gradient of {spec.op.name}", scale=scale).to(dtype)


def gradients(spec: Spec, arguments: Arguments, grad: torch.Tensor, backend: Backend) -> Gradients:
    """By autograd through the op, forward and backward by this backend."""
    assert spec.op.gradient is not None
    here = torch.autograd.set_multithreading_enabled(False)  # a record sees the calls of its own thread
    with here, ops.use_backend(backend.name), ops.record() as calls:
        found = stock.gradients(spec.op, arguments, stock.differentiated(spec.op, arguments), grad.to(backend.device))
    assert [(c.op, c.backend) for c in calls] == [(op.name, backend.name) for op in (spec.op, spec.op.gradient.op)]
    return dict(zip(names_of(spec, arguments), found, strict=True))


@functools.lru_cache(maxsize=4)
def expected(op: str, case: Case, dtype: torch.dtype, device: str) -> list[tuple]:
    """(name, rounded arguments, upstream gradient, ref, base) of each call: the same for every backend."""
    spec = next(s for s in SPECS if s.op.name == op)
    found = []
    for name, exact in spec.inputs(case, dtype):
        rounded = cast(exact, dtype, device)
        found.append((name, rounded, *ref_and_base(spec, rounded, upstream(spec, exact, dtype, name).to(device))))
    return found


def ref_and_base(spec: Spec, rounded: Arguments, grad: torch.Tensor) -> tuple[torch.Tensor, Gradients, Gradients]:
    """grad, and by the reference in float64 on the CPU and by autograd of the stock formula the gradients."""
    places = stock.differentiated(spec.op, rounded)
    ref = gradients(spec, cast(rounded, torch.float64), grad.cpu().double(), Backend("reference", "cpu"))
    base = stock.gradients(spec.stock, rounded, places, grad)
    if not all(
        g.isfinite().any() for g in base if g.numel()
    ):  # torch's LayerNorm keeps 1/σ in fp16, which ends at 65504
        wide = stock.gradients(spec.stock, cast(rounded, torch.float32), places, grad.float())
        base = tuple(g.to(like.dtype) for g, like in zip(wide, base, strict=True))
    return grad, ref, dict(zip(ref, base, strict=True))


def judged_gradients(
    spec: Spec, case: Case, dtype: torch.dtype, backend: Backend
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]]:
    """(check, (ours, ref, base, elementwise)) of each call of the spec and each gradient.

    Gradients of few numbers are judged over all calls together: base's error in one is a matter of luck.
    """
    few: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for name, rounded, grad, ref, base in expected(spec.op.name, case, dtype, backend.device):
        for output, ours in gradients(spec, rounded, grad, backend).items():
            found = ours.cpu(), ref[output], base[output].cpu()
            if 0 < ours.numel() < FEW:
                few.setdefault(output, []).append(tuple(x.flatten() for x in found))
                continue
            check = "/".join([spec.op.gradient.op.name, str(backend), output, *([name] if name else [])])
            yield check, (*found, spec.elementwise(output))
    for output, calls in few.items():
        check = "/".join([spec.op.gradient.op.name, str(backend), output, "all calls"])
        yield check, (*(torch.cat(x) for x in zip(*calls, strict=True)), spec.elementwise(output))


def gelu_slopes(spec: Spec, dtype: torch.dtype, approximate: str, backend: Backend) -> tuple[torch.Tensor, ...]:
    """GELU's slope at every value of gelu_inputs: ours, ref and base. Weights are identities, the upstream ones.

    By tanh only at those below 2^40: torch's own slope there is NaN where a power of x is infinite.
    """
    x, eye, *_ = cast(gelu_inputs(dtype, approximate), dtype, backend.device)
    x = x if approximate == "none" else x.where(x.abs() < 2**40, 0)
    weights = {"bias_gelu": (), "linear_gelu": (eye,), "feed_forward": (eye, None, eye)}[spec.op.name]
    arguments, ones = (x, *weights, None, approximate), torch.ones_like(x)
    _, ref, base = ref_and_base(spec, arguments, ones)
    found = gradients(spec, arguments, ones, backend), ref, base
    return tuple(gradient["x_grad"].cpu() for gradient in found)


def gradient_verdicts(spec: Spec, case: Case, dtype: torch.dtype, backend: Backend) -> Iterator[tuple[str, float]]:
    """(check, ratio) of what test_gradients asserts, for the tests of the tests."""
    for check, (ours, ref, base, elementwise) in judged_gradients(spec, case, dtype, backend):
        yield check, judge(ours, ref, base, elementwise).ratio


def test_gradients(spec, gradient_case, dtype, plain_backend, parity):
    for check, tensors in judged_gradients(spec, gradient_case, dtype, plain_backend):
        parity(*tensors[:3], name=check, elementwise=tensors[3])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_slope_of_gelu_over_the_full_range(spec, dtype, plain_backend, approximate, parity):
    """Every finite 16-bit value, 128 fp32 values of each binade: judged per binade of the slope."""
    check = f"gelu_backward/{plain_backend}/{approximate}/{spec.op.name}"
    parity(*gelu_slopes(spec, dtype, approximate, plain_backend), name=check, elementwise=True)


def test_reference_gradients_are_the_formulas(spec, gradient_case):
    """In float64 the reference's gradients are those of autograd through the stock formula."""
    for name, _, _, ref, base in expected(spec.op.name, gradient_case, torch.float64, "cpu"):
        for output in ref:
            torch.testing.assert_close(
                ref[output], base[output], rtol=1e-9, atol=1e-9 * (1 + float(ref[output].abs().max())),
                msg=lambda m, check=f"{output} {name}": f"{check}: {m}",
            )  # fmt: skip


def test_gradients_of_strided_tensors(spec, dtype, plain_backend, parity):
    """Inputs and upstream gradients that are not contiguous; an upstream gradient that is one row, expanded."""
    for name, rounded, grad, ref, base in expected(spec.op.name, plain_backend.edges, dtype, plain_backend.device):
        views = tuple(strided(a) if isinstance(a, torch.Tensor) else a for a in rounded)
        ours = gradients(spec, views, strided(grad), plain_backend)
        one = grad[:1].expand_as(grad)
        _, ref_of_one, base_of_one = ref_and_base(spec, rounded, one)
        of_one = gradients(spec, rounded, one, plain_backend)
        for kind, *found in (("strided", ours, ref, base), ("expanded", of_one, ref_of_one, base_of_one)):
            for output in ref:
                check = f"{spec.op.gradient.op.name}/{plain_backend}/{output}/{kind}/{name}"
                tensors = (gradient[output].cpu() for gradient in found)
                parity(*tensors, name=check, elementwise=spec.elementwise(output))


def test_gradcheck(spec, plain_backend):
    """Against numeric differences in float64, forward and backward by the same backend."""
    for name, exact in spec.inputs(SMALL, torch.float64):
        if name in ("small variance", "variance of size eps", "zeros"):
            continue  # so curved that no step of a difference is small enough
        arguments = list(cast(exact, torch.float64, plain_backend.device))
        if "padding" in name:
            arguments[-2:] = -1, -1  # a row that is to get no gradient has a numeric one
        for i in stock.differentiated(spec.op, arguments):
            arguments[i] = arguments[i].requires_grad_()
        with ops.use_backend(plain_backend.name):
            assert torch.autograd.gradcheck(lambda *a: as_tuple(spec.op(*with_bias_added(spec, a)))[0], arguments)


def with_bias_added(spec: Spec, arguments: Arguments) -> Arguments:
    """Of attention, whose bias qkv holds already: qkv with it, so that numeric differences in the bias see it."""
    if spec.op.name != "attention" or len(arguments) < 9:
        return arguments
    return arguments[0] + arguments[8].detach(), *arguments[1:]


def test_opcheck_of_gradients(spec):
    """torch.library's own tests of an op with autograd, AOTAutograd with changing shapes among them."""
    for name, exact in spec.inputs(SMALL, torch.float32):
        if "variance" in name or name in ("zeros", "large mean", "peaked", "int32"):
            continue  # other values, the same graph
        arguments = list(cast(exact, torch.float32))
        for i in stock.differentiated(spec.op, arguments):
            arguments[i] = arguments[i].requires_grad_()
        torch.library.opcheck(spec.op.overload, tuple(arguments))


def backward_call(spec: Spec, arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """What the op's backward is called with."""
    with torch.no_grad():
        found = as_tuple(spec.op(*arguments))
    return backward_arguments(spec.op, arguments, found, upstream(spec, arguments, dtype).to(found[0].device))


def test_opcheck_of_the_backward(spec, dtype, plain_backend):
    """Schema and fake hold, whichever gradients are needed."""
    for case in (SMALL, NO_TOKENS):
        for name, exact in spec.inputs(case, dtype):
            if "variance" in name or name in ("zeros", "large mean", "peaked"):
                continue  # other values, the same call
            call = backward_call(spec, cast(exact, dtype, plain_backend.device), dtype)
            patterns = [call]
            if isinstance(call[-1], list):
                patterns = [(*call[:-1], list(p)) for p in itertools.product(*([False, *[True] * n] for n in call[-1]))]
                patterns = patterns if dtype == torch.float32 else [patterns[-1], patterns[len(patterns) // 3]]
            with ops.use_backend(plain_backend.name):
                for pattern in patterns:
                    tests = ("test_schema", "test_faketensor")
                    torch.library.opcheck(spec.op.gradient.op.overload, pattern, test_utils=tests)


def test_only_what_is_needed_is_returned(spec, dtype, plain_backend):
    """Each gradient alone, and all but one: bitwise what the full run gives; frozen inputs get none."""
    for _, rounded, grad, *_ in expected(spec.op.name, plain_backend.edges, dtype, plain_backend.device):
        full = gradients(spec, rounded, grad, plain_backend)
        places = stock.differentiated(spec.op, rounded)
        for wanted in [(i,) for i in places] + [tuple(j for j in places if j != i) for i in places if len(places) > 1]:
            with ops.use_backend(plain_backend.name):
                leaves = [a.detach().requires_grad_(i in wanted) if i in places else a for i, a in enumerate(rounded)]
                as_tuple(spec.op(*leaves))[0].backward(grad)
            for place, name in zip(places, full, strict=True):
                assert (leaves[place].grad is not None) == (place in wanted)
                assert place not in wanted or torch.equal(leaves[place].grad, full[name])


def test_gradients_share_no_memory(spec, plain_backend):
    """No gradient is a view of an input, of the upstream gradient or of another one; nothing of these is written."""
    wide = (torch.float64,) if plain_backend.takes_float64 else ()
    for dtype in (torch.float32, torch.bfloat16, *wide):
        for _, rounded, grad, *_ in expected(spec.op.name, plain_backend.edges, dtype, plain_backend.device):
            inputs = [t for t in (*rounded, grad) if isinstance(t, torch.Tensor)]
            copies = [t.clone() for t in inputs]
            found = list(gradients(spec, rounded, grad, plain_backend).values())
            places = [t.untyped_storage().data_ptr() for t in found]
            assert len(set(places)) == len(places)
            assert not set(places) & {t.untyped_storage().data_ptr() for t in inputs}
            assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_gradients_are_bitwise_the_same_again(spec, dtype, plain_backend):
    for _, rounded, grad, *_ in expected(spec.op.name, plain_backend.edges, dtype, plain_backend.device):
        first, second = (gradients(spec, rounded, grad, plain_backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens_no_gradient(spec, dtype, plain_backend):
    for _, rounded, grad, *_ in expected(spec.op.name, NO_TOKENS, dtype, plain_backend.device):
        places = stock.differentiated(spec.op, rounded)
        for place, found in zip(places, gradients(spec, rounded, grad, plain_backend).values(), strict=True):
            assert (found.dtype, found.shape) == (dtype, rounded[place].shape)
            assert not found.any()


def test_other_sequences_get_no_gradient(spec, dtype, plain_backend):
    """NaN in the upstream gradient of one sequence stays there: the rows of the others are bitwise as they were."""
    start, end = plain_backend.edges.cu_seqlens().tolist()[2:4]  # the sequence of 128
    others = torch.ones(plain_backend.edges.tokens, dtype=torch.bool)
    others[start:end] = False
    for _, rounded, grad, *_ in expected(spec.op.name, plain_backend.edges, dtype, plain_backend.device):
        poisoned = grad.clone()
        poisoned[start:end] = torch.nan
        before, after = (gradients(spec, rounded, g, plain_backend) for g in (grad, poisoned))
        for place in spec.rows:
            name = f"{spec.op.arguments()[place]}_grad"
            assert torch.equal(before[name][others], after[name][others])
            assert after[name][start:end].isnan().any()


def test_second_derivatives(spec):
    """With create_graph=True, gradients of gradients: gradgradcheck, and inputs of which one comes from another."""
    arguments = cast(next(iter(spec.inputs(SMALL, torch.float64)))[1], torch.float64)
    places = stock.differentiated(spec.op, arguments)
    leaves = [arguments[i].clone().requires_grad_() for i in places]

    def first(*inputs: torch.Tensor) -> torch.Tensor:
        called = list(arguments)
        for place, x in zip(places, inputs, strict=True):
            called[place] = x
        return as_tuple(spec.op(*called))[0]

    assert torch.autograd.gradgradcheck(first, leaves)
    shared = leaves[0]
    related = [shared, *(x + shared.sum() for x in leaves[1:])]
    once, again = (
        torch.autograd.grad(first(*related).square().sum(), shared, create_graph=c)[0] for c in (False, True)
    )
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-9)


def test_a_backward_op_is_not_differentiated_itself(spec):
    with pytest.raises(NotImplementedError, match=f"{spec.op.name}_backward cannot be differentiated: differentiate"):
        spec.op.gradient.op.no_backward()
