"""Dispatch: the order of backends, use_backend, record, refusals in words."""

from __future__ import annotations

import contextlib
import inspect
import threading

import pytest
import torch

from fastbert import ops
from fastbert.ops import Backend, registry

X, W = torch.ones(2, 8), torch.ones(4, 8)


@pytest.fixture
def refusing(monkeypatch):
    """linear's backend "torch" refuses everything, for two reasons."""
    reasons = ["the moon is full", "2 is an even number"]
    monkeypatch.setitem(ops.linear.backends, "torch", Backend("torch", lambda *a: 1 / 0, lambda *a: reasons))
    ops.linear._order.clear()
    yield
    ops.linear._order.clear()


def backend_of_a_call():
    with ops.record() as calls:
        ops.linear(X, W)
    return [call.backend for call in calls]


def test_the_reference_is_tried_last():
    for op in ops.ALL:
        assert [b.name for b in op.order("cpu")][-1] == "reference"
    assert backend_of_a_call() == ["torch"]


def test_a_backend_for_another_device_is_not_tried():
    assert "cuda" not in [b.name for b in ops.unpad.order("cpu")]
    assert "cuda" in [b.name for b in ops.unpad.order("cuda")]


def test_every_op_is_a_torch_op_too():
    for op in ops.ALL:
        schema = getattr(torch.ops.fastbert, op.name).default._schema
        assert [a.name for a in schema.arguments] == list(inspect.signature(op.backends["reference"].run).parameters)
        assert op.arguments() == tuple(a.name for a in schema.arguments)
        assert op.returns() == tuple(output.name for output in schema.returns)
    with ops.record() as calls:
        torch.ops.fastbert.linear(X, W)
    assert [call.op for call in calls] == ["linear"]


@pytest.mark.parametrize("names", [("reference",), ("torch",), ("cuda", "reference"), ("reference", "torch")])
def test_a_forced_backend_runs(names):
    with ops.use_backend(*names):
        assert registry._forced.get() == names
        assert backend_of_a_call() == [next(n for n in names if n in ops.linear.backends)]
    assert registry._forced.get() is None


def test_the_inner_choice_holds_and_ends():
    with ops.use_backend("reference"):
        with ops.use_backend("torch"):
            assert backend_of_a_call() == ["torch"]
        assert backend_of_a_call() == ["reference"]
    assert backend_of_a_call() == ["torch"]


def test_the_choice_ends_with_an_exception():
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert backend_of_a_call() == ["torch"]


def test_another_thread_keeps_its_own_choice():
    seen = []
    with ops.use_backend("reference"), ops.record() as calls:
        thread = threading.Thread(target=lambda: seen.extend([registry._forced.get(), *backend_of_a_call()]))
        thread.start()
        thread.join()
        assert backend_of_a_call() == ["reference"]
    assert seen == [None, "torch"]
    assert [c.backend for c in calls] == [], "an inner record keeps the calls to itself, another thread's are not seen"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("fast",), r"unknown backend fast; the backends are reference, torch, triton, cuda, cpu"),
        (("torch", "a", "b"), "unknown backend a, b"),
        ((), r"unknown backend \(none given\)"),
    ],
)
def test_an_unknown_backend_is_named(names, words):
    with pytest.raises(ValueError, match=words), ops.use_backend(*names):
        pass


def test_a_backend_that_the_op_lacks_is_refused():
    with (
        ops.use_backend("cuda"),
        pytest.raises(ops.BackendRefused, match=r"no backend takes this call on cpu") as caught,
    ):
        ops.linear(X, W)
    assert "cuda: not a backend of this op (it has cpu, torch, triton, reference)" in str(caught.value)


def test_all_reasons_are_given_at_once(refusing):
    with ops.use_backend("torch"), pytest.raises(ops.BackendRefused) as caught:
        ops.linear(X, W)
    assert "torch: the moon is full\n  torch: 2 is an even number" in str(caught.value)


def test_a_refused_backend_is_passed_over(refusing):
    assert backend_of_a_call() == ["reference"]
    with ops.use_backend("torch", "reference"):
        assert backend_of_a_call() == ["reference"]


def test_record_keeps_op_backend_and_shapes_in_order():
    with ops.record() as calls:
        ops.unpad(torch.ones(2, 3))
        ops.linear(X, W, bias=None)
    ops.linear(X, W)
    unpad = ops.unpad.order("cpu")[0]
    name = unpad.name if not unpad.reasons(torch.ones(1, 1)) else calls[0].backend
    assert calls == [ops.Call("unpad", name, ((2, 3),)), ops.Call("linear", "torch", ((2, 8), (4, 8)))]


def calls_of_a_gradient(*forward, backward=None):
    """(op, backend) of a linear forced to some backends, and of its backward, run under another choice."""
    x = X.clone().requires_grad_()
    with ops.record() as calls:
        with ops.use_backend(*forward):
            y = ops.linear(x, W)
        with ops.use_backend(backward) if backward else contextlib.nullcontext():
            y.sum().backward()
    return [(call.op, call.backend) for call in calls]


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_backward_runs_on_the_backend_of_its_forward(name):
    """Also when it runs outside the choice, or under another one."""
    expected = [("linear", name), ("linear_backward", name)]
    assert calls_of_a_gradient(name) == expected
    assert calls_of_a_gradient(name, backward="torch") == expected
    assert calls_of_a_gradient("cuda", name) == expected


def test_a_backward_in_another_thread_keeps_the_choice():
    x, seen = X.clone().requires_grad_(), []
    with ops.use_backend("reference"):
        y = ops.linear(x, W)

    def run():
        with ops.record() as calls:
            y.sum().backward()
        seen.extend((call.op, call.backend) for call in calls)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [("linear_backward", "reference")]


def test_every_backward_is_named_after_its_op():
    assert all(op.gradient.op.name == f"{op.name}_backward" for op in ops.FORWARD if op.gradient is not None)
    without = {op.name for op in ops.FORWARD if op.gradient is None}
    assert without == {"unpad", "dropout_bits", "encoder_forward", "quantized_linear"}
    assert {op.name for op in ops.ALL} == {op.name for op in (*ops.FORWARD, *ops.BACKWARD)}
    assert all(op.gradient.op.forward is op for op in ops.FORWARD if op.gradient is not None)
    assert all(op.forward is None for op in ops.FORWARD)


def test_gradients_have_the_names_of_what_they_are_of():
    for op in ops.FORWARD:
        if op.gradient is not None and op.name != "pad":
            assert op.gradient.op.returns() == tuple(f"{name}_grad" for name in op.gradient.of)


def test_discrete_outputs_have_no_gradient():
    mask = torch.ones(2, 3, requires_grad=True)
    assert not any(found.requires_grad for found in ops.unpad(mask))
    for op in (ops.unpad, ops.dropout_bits):
        with pytest.raises(NotImplementedError, match=f"{op.name} cannot be differentiated: its outputs are discrete"):
            op.no_backward()


def test_only_the_first_output_is_differentiable():
    x = X.clone().requires_grad_()
    y, pre = ops.linear_gelu(x, W, None, "none", True)
    assert y.requires_grad and not pre.requires_grad
    _, mean, rstd = ops.add_layer_norm(x, None, X, X[0], X[0], 1e-12)
    assert not mean.requires_grad and not rstd.requires_grad


def test_a_packed_weight_passes_gradients_on():
    """To x; the packed weight itself is a copy and gets none."""
    weight = torch.randn(32, 64)
    x = torch.randn(30, 64, requires_grad=True)
    ops.linear(x, ops.pack_weight(weight)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(30, 64))


def test_no_graph_is_made_where_no_gradient_is_wanted():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not ops.linear(x, W).requires_grad
    with torch.inference_mode():
        assert not ops.linear(x, W).requires_grad
    assert not ops.linear(X, W).requires_grad


def test_nothing_is_recorded_of_a_call_that_failed():
    with ops.record() as calls, pytest.raises(ValueError):
        ops.linear(X, torch.ones(4, 9))
    assert calls == []


def test_the_ops_can_be_traced():
    """The fakes give torch.compile's tracer the shapes, also where the number of tokens depends on the data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        mask = mode.from_tensor(torch.ones(2, 5))
        indices, cu_seqlens, order = torch.ops.fastbert.unpad(mask)
        assert indices.dim() == 1 and cu_seqlens.shape == (3,) and order.shape == (2,)
        assert torch.ops.fastbert.linear(mode.from_tensor(X), mode.from_tensor(W)).shape == (2, 4)
