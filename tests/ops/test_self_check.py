"""A kernel of ours without a record is checked at its first use: a wrong one is warned of once and never runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import devices, doctor, once, ops, proven, report
from fastbert.ops import Backend, builtins, registry, sample_calls, samples, self_check
from tests.models.small import batch, pair

CPU = torch.device("cpu")
CARD = devices.card(CPU)
OPS = {op.name: op for op in ops.ALL}
X, W = torch.randn(5, 8), torch.randn(4, 8)
MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])


@pytest.fixture(autouse=True)
def _unproven(monkeypatch):
    """Every kernel as on a card without a record, and no warning said before."""
    monkeypatch.setattr(proven, "records", lambda: ())
    monkeypatch.setattr(once, "_said", {})


class Planted:
    """A kernel of ours, first choice of an op, and how often it was called."""

    def __init__(self, monkeypatch, op, run, refuse=None):
        self.calls, self.op, self.run = 0, op, run
        self.backend = Backend("cpu", self.count, refuse, devices=("cpu",))
        others = {name: backend for name, backend in op.backends.items() if name != "cpu"}
        monkeypatch.setattr(op, "backends", {"cpu": self.backend, **others})
        monkeypatch.setattr(op, "_order", {})

    def count(self, *arguments):
        self.calls += 1
        return self.run(*arguments)

    @property
    def known(self):
        return self.backend.verdicts.get((torch.float32, CPU))


@pytest.fixture
def plant(monkeypatch):
    return lambda op, run, refuse=None: Planted(monkeypatch, op, run, refuse)


def backends_of(call):
    with ops.record() as calls:
        call()
    return [made.backend for made in calls]


def linear_backends(x=X, weight=W):
    return backends_of(lambda: ops.linear(x, weight))


# what passes


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_what_is_right_passes_in_every_dtype(op, plant):
    planted = plant(op, op.backends["torch"].run)
    for dtype in sample_calls.dtypes(op):
        assert self_check.refusal(op, planted.backend, dtype, CPU) == ""
    assert planted.calls


def packed(run, *places):
    return lambda *a: run(*(ops.pack_weight(x, "torch") if i in places else x for i, x in enumerate(a)))


def padded(qkv, bounds, longest, scale, bits=None, p=0.0, order=None, classes=(), bias=None):
    return builtins.attention_padded(qkv, bounds, longest, scale, bits, p)


def padded_backward(grad, qkv, out, lse, bounds, longest, scale, bits, p, order, classes, needed):
    dqkv = builtins.attention_padded_backward(grad, qkv, bounds, longest, scale, bits, p)
    return dqkv, dqkv.sum(0) if needed[1] else dqkv.new_empty(0)


OTHERS = {
    "linear": packed(builtins.linear, 1),
    "linear_gelu": packed(builtins.linear_gelu, 1),
    "feed_forward": packed(builtins.feed_forward, 1, 3),
    "attention": padded,
    "attention_backward": padded_backward,
    **{op.name: op.backends["reference"].run for op in ops.BACKWARD if op.name != "attention_backward"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_rounds_otherwise_passes(name, plant):
    op = OPS[name]
    planted = plant(op, OTHERS[name])
    for dtype in sample_calls.dtypes(op):
        assert self_check.refusal(op, planted.backend, dtype, CPU) == ""


def test_the_native_library_passes():
    backend = ops.unpad.backends["cpu"]
    if reasons := backend.reasons(MASK):
        pytest.skip("; ".join(reasons))
    fresh = dataclasses.replace(backend)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float64):
        assert self_check.refusal(ops.unpad, fresh, dtype, CPU) == ""


# what does not


def changed(run, change):
    """A kernel whose outputs are changed."""

    def wrong(*arguments):
        outputs = sample_calls.outputs(run(*arguments))
        found = tuple(change(x, arguments) if x.numel() else x for x in outputs)
        return found if len(found) > 1 or found[0] is None else found[0]

    return wrong


def raising(x, arguments):
    raise RuntimeError("no kernel image is available\nfor this card")


def one_nan(x, arguments):
    return x.clone().index_fill_(0, torch.tensor([0]), float("nan"))


LINEAR = {
    "numbers off": (lambda x, a: x * 1.01, "y is off (max ratio"),
    "NaN": (one_nan, "nan where ref is"),
    "raises": (raising, "RuntimeError: no kernel image is available"),
    "wrong dtype": (lambda x, a: x.double(), "y is float64 [146, 384] on cpu, not float32 [146, 384] on cpu"),
    "wrong shape": (lambda x, a: x[1:], "y is float32 [145, 384] on cpu, not float32 [146, 384] on cpu"),
    "only without a bias": (lambda x, a: x + (a[2] is None), "head dim 64: no bias"),
    "only at head dim 32": (lambda x, a: x + (a[0].shape[1] == 96), "head dim 32: a bias"),
    "no tensor": (lambda x, a: None, "AttributeError: 'NoneType' object has no attribute 'dtype'"),
}


@pytest.mark.parametrize("error", LINEAR)
def test_a_wrong_kernel_is_warned_of_once_and_does_not_run(error, plant, caplog):
    change, words = LINEAR[error]
    planted = plant(ops.linear, changed(builtins.linear, change))
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert linear_backends() == linear_backends() == ["torch"]
        samples.op_backends("cpu")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(
        f"fastbert's kernel linear (cpu) is not used: it failed its self-check in float32 on {CARD}: "
    )
    assert words in warning
    assert warning.endswith(". torch is tried instead")
    assert torch.equal(ops.linear(X, W), torch.nn.functional.linear(X, W))
    assert words in planted.known


def test_a_kernel_that_returns_too_little_fails(plant):
    planted = plant(ops.linear_gelu, lambda *a: builtins.linear_gelu(*a)[0])
    assert self_check.refusal(ops.linear_gelu, planted.backend, torch.float32, CPU)


def test_wrong_in_one_dtype_only(plant, caplog):
    plant(ops.linear, changed(builtins.linear, lambda x, a: x + (x.dtype == torch.bfloat16)))
    assert linear_backends() == ["cpu"]
    assert linear_backends(X.bfloat16(), W.bfloat16()) == ["torch"]
    assert linear_backends(X.half(), W.half()) == ["cpu"]
    assert [record.getMessage().count("in bfloat16 on") for record in caplog.records] == [1]


def without_empty_rows(mask, tokens=-1):
    indices, bounds, order = builtins.unpad(mask, tokens)
    keep = torch.cat([torch.ones(1, dtype=torch.bool), bounds.diff() > 0])
    return indices, torch.where(keep, bounds, bounds + 1), order


def test_wrong_only_at_an_empty_row(plant, caplog):
    plant(ops.unpad, without_empty_rows)
    assert backends_of(lambda: ops.unpad(MASK)) == ["torch"]
    assert ops.unpad(MASK)[1].tolist() == [0, 2, 2, 3]
    assert "cu_seqlens differs, where lengths are [17, 0, 1, 64, 15, 33, 16]" in caplog.text


def test_wrong_only_at_mask_values_other_than_1(plant):
    planted = plant(ops.unpad, lambda mask, tokens=-1: builtins.unpad(mask == 1, tokens))
    assert self_check.refusal(ops.unpad, planted.backend, torch.int64, CPU)
    assert self_check.refusal(ops.unpad, planted.backend, torch.bool, CPU) == ""


def test_wrong_only_where_a_residual_has_another_dtype(plant):
    """As under autocast: x in 16 bits, residual and LayerNorm in float32."""
    wrong = changed(builtins.add_layer_norm, lambda y, a: y + (a[0].dtype != a[2].dtype))
    planted = plant(ops.add_layer_norm, wrong)
    assert "a residual in float32" in self_check.refusal(ops.add_layer_norm, planted.backend, torch.bfloat16, CPU)
    assert self_check.refusal(ops.add_layer_norm, planted.backend, torch.float32, CPU) == ""


@pytest.mark.parametrize("name", [op.name for op in ops.ALL if op.name != "linear"])
def test_every_output_of_every_op_is_compared(name, plant):
    op = OPS[name]
    for place, output in enumerate(op.returns()):

        def wrong(*arguments, place=place):
            found = list(sample_calls.outputs(op.backends["torch"].run(*arguments)))
            found[place] = found[place] + (0.02 * found[place].abs().amax() if found[place].numel() else 0)
            return tuple(found) if len(found) > 1 else found[0]

        def wrong_integers(*arguments, place=place):
            found = list(sample_calls.outputs(op.backends["torch"].run(*arguments)))
            found[place] = found[place] + 1
            return tuple(found) if len(found) > 1 else found[0]

        dtype = sample_calls.dtypes(op)[0]
        planted = plant(op, wrong if dtype.is_floating_point else wrong_integers)
        assert f": {output} " in f": {self_check.refusal(op, planted.backend, dtype, CPU).split(CARD)[1][2:]}"


def test_a_kernel_that_takes_no_sample_call_does_not_run(plant):
    planted = plant(ops.linear, builtins.linear, lambda x, *rest: [] if x.shape[1] == 8 else ["made for 8 columns"])
    assert linear_backends() == ["torch"]
    assert planted.known.endswith("it takes none of the calls that it would be checked with")


def test_what_a_kernel_refuses_is_left_out(plant):
    wrong_elsewhere = changed(builtins.linear, lambda x, a: x + (a[0].shape[1] == 96))
    planted = plant(ops.linear, wrong_elsewhere, lambda x, *rest: ["not 96"] if x.shape[1] == 96 else [])
    assert linear_backends() == ["cpu"]
    assert planted.known == ""


# what is said


def test_a_forced_kernel_that_failed_raises_in_words(plant):
    plant(ops.linear, changed(builtins.linear, lambda x, a: x * 1.01))
    with (
        ops.use_backend("cpu"),
        pytest.raises(ops.BackendRefused, match="it failed its self-check in float32") as caught,
    ):
        ops.linear(X, W)
    assert "fastbert.ops.linear: no backend takes this call on cpu\n  cpu: it failed" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "then"),
    [(("cpu",), ""), (("reference", "cpu"), ""), (("cpu", "reference"), ". reference is tried instead")],
    ids=["alone", "last", "first"],
)
def test_the_warning_says_what_is_tried_instead(names, then, plant, caplog):
    planted = plant(ops.linear, changed(builtins.linear, lambda x, a: x * 1.01))
    with ops.use_backend(*names):
        words = self_check.refusal(ops.linear, planted.backend, torch.float32, CPU)
    assert [r.getMessage() for r in caplog.records] == [f"fastbert's kernel linear (cpu) is not used: {words}{then}"]


def test_a_model_falls_back_and_explains(plant, caplog):
    expected, model = pair("BertModel", "bert")
    plant(ops.attention, changed(builtins.attention, lambda x, a: x * 1.02))
    inputs = batch("bert")
    with torch.enable_grad(), ops.record() as calls:  # layer by layer
        ours = model(**inputs)
    assert {call.backend for call in calls if call.op == "attention"} == {"torch"}
    fresh = fastbert.accelerate(expected)
    OPS["attention"].backends.pop("cpu")
    OPS["attention"]._order.clear()
    with torch.enable_grad():
        assert torch.equal(ours.last_hidden_state, fresh(**inputs).last_hidden_state)
    assert [record.levelname for record in caplog.records if "attention" in record.getMessage()] == ["WARNING"]


def test_explain_and_doctor_tell_a_failure(plant):
    _, model = pair("BertModel", "bert")
    plant(ops.linear, changed(builtins.linear, lambda x, a: x * 1.01))
    assert f"linear: torch (not cpu: it failed its self-check in float32 on {CARD}: y is off" in str(
        fastbert.explain(model)
    )
    lines = [line for line in doctor.kernels() if (line["kernel"], line["backend"]) == ("linear", "cpu")]
    assert {(line["dtype"], line["state"]) for line in lines} == {
        (name, "failed") for name in ("float32", "bfloat16", "float16")
    }
    assert "it failed its self-check in bfloat16" in text_of(report._kernel_table(doctor.kernels()))


def text_of(table):
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_explain_and_doctor_tell_a_check_and_a_record(plant, monkeypatch):
    _, model = pair("BertModel", "bert")
    plant(ops.linear, builtins.linear)
    assert "  linear: cpu, self-check passed, before torch: unmeasured\n" in str(fastbert.explain(model))
    states = {
        line["state"]: line for line in doctor.kernels() if (line["kernel"], line["backend"]) == ("linear", "cpu")
    }
    assert states["checked"]["words"] == "self-check passed"
    assert states["checked"]["card"] == CARD
    monkeypatch.setattr(proven, "records", lambda: (record_of_linear(),))
    monkeypatch.setattr(proven, "running", lambda kernel, backend: "those of now")
    proof = f"proven on {CARD}: record of 2026-01-02, commit 0123abcd"
    assert f"  linear: cpu, {proof}, before torch: unmeasured\n" in str(fastbert.explain(model))
    lines = {
        line["dtype"]: line["state"]
        for line in doctor.kernels()
        if (line["kernel"], line["backend"]) == ("linear", "cpu")
    }
    assert lines == {"float32": "proven", "bfloat16": "checked", "float16": "checked"}


def test_explain_marks_an_order_that_no_record_is_behind():
    _, model = pair("BertModel", "bert")
    told = fastbert.explain(model)
    assert "pad" not in told.unmeasured and "\n  pad: torch\n" in str(told)  # nothing else takes it
    with fastbert.use_backend("reference", "torch"):
        told = fastbert.explain(model)
        assert told.unmeasured["linear"] == ["torch"]
        assert "\n  linear: reference, before torch: unmeasured\n" in str(told)


def test_doctor_says_why_a_kernel_is_not_run_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    on_cuda = [line for line in doctor.kernels() if line["backend"] == "cuda"]
    assert {(line["state"], line["words"]) for line in on_cuda} == {("not run", "torch sees no cuda device")}
    monkeypatch.setattr("fastbert.native.refuse", lambda device: ["the moon is full"])
    on_cpu = [line for line in doctor.kernels() if line["backend"] == "cpu"]
    assert {(line["state"], line["words"]) for line in on_cpu} == {("not run", "the moon is full")}


# what cannot be checked now


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    torch.OutOfMemoryError("Allocation would exceed what is allowed"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
]


def assert_no_verdict(planted, caplog, words):
    assert linear_backends() == ["torch"]
    refused = self_check.standing(ops.linear, planted.backend, torch.float32, CPU)
    assert refused == ("not run", f"it could not be checked: {words}")
    assert (planted.backend.verdicts, caplog.records) == ({}, [])


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_no_memory_for_a_check_is_no_verdict(error, plant, caplog):
    def run(*arguments):
        if full:
            raise error
        return builtins.linear(*arguments)

    full = True
    planted = plant(ops.linear, run)
    assert_no_verdict(planted, caplog, f"{type(error).__name__}: {str(error) or 'no message'}")
    full = False
    assert linear_backends() == ["cpu"]


def test_no_thread_for_a_check_is_no_verdict(plant, caplog, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    planted = plant(ops.linear, builtins.linear)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert_no_verdict(planted, caplog, "NoThread: can't start new thread")
        assert samples.op_backends("cpu")["linear"]["cpu"][0].startswith("it could not be checked: ")
    assert linear_backends() == ["cpu"]


# A kernel of unpad, right and slow, in place of the native library's.
UNPAD = """
import atexit, logging, signal, time, torch
from fastbert import ops, proven
from fastbert.ops import Backend, builtins, samples
logging.basicConfig()
proven.records = lambda: ()
def run(*arguments):
    time.sleep(0.05)
    return builtins.unpad(*arguments)
others = [backend for name, backend in ops.unpad.backends.items() if name != "cpu"]
ops.unpad.backends.clear()
for backend in (Backend("cpu", run, devices=("cpu",)), *others):
    ops.unpad.add(backend)
def used():
    with ops.record() as calls:
        assert ops.unpad(torch.tensor([[0, 1]]))[0].tolist() == [1]
    return calls[0].backend
"""
AT_EXIT = "atexit.register(lambda: print(used(), samples.op_backends('cpu')['unpad']['cpu'][0]))"
IN_A_HANDLER = """
signal.signal(signal.SIGALRM, lambda *_: print(used()))
signal.setitimer(signal.ITIMER_REAL, 0.1)
print(used(), [*ops.unpad.backends["cpu"].verdicts.values()])
"""


def said_by(code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_first_use_at_the_interpreters_end():
    (line,) = said_by(UNPAD + AT_EXIT)
    assert line.startswith("torch it could not be checked: NoThread: cannot schedule new futures after ")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_signal_handler_runs_a_forward_during_a_check():
    """It neither waits for the check, which waits for it, nor changes its verdict."""
    assert said_by(UNPAD + IN_A_HANDLER) == ["torch", "cpu ['', '']"]


# records


def record_of_linear(**changes):
    return proven.Record(**({
        "kernel": "linear", "backend": "cpu", "card": CARD, "dtypes": ["float32"], "sources": "those of now",
        "commit": "0123abcd", "date": "2026-01-02T03:04:05+00:00", "measured": "here",
    } | changes))  # fmt: skip


def test_a_record_skips_the_check(plant, monkeypatch):
    monkeypatch.setattr(proven, "records", lambda: (record_of_linear(),))
    monkeypatch.setattr(proven, "running", lambda kernel, backend: "those of now")
    planted = plant(ops.linear, builtins.linear)
    assert linear_backends() == ["cpu"]
    assert planted.calls == 1
    linear_backends(X.bfloat16(), W.bfloat16())
    assert planted.calls > 2, "the record says nothing of bfloat16"


@pytest.mark.parametrize(
    "other", [{"kernel": "pad"}, {"backend": "cuda"}, {"card": "another"}, {"sources": "those of before"}], ids=str
)
def test_a_record_of_something_else_skips_nothing(other, plant, monkeypatch):
    monkeypatch.setattr(proven, "records", lambda: (record_of_linear(**other),))
    monkeypatch.setattr(proven, "running", lambda kernel, backend: "those of now")
    planted = plant(ops.linear, changed(builtins.linear, lambda x, a: x * 1.01))
    assert linear_backends() == ["torch"]
    assert planted.calls


def records_in(folder, monkeypatch, text):
    monkeypatch.undo()
    monkeypatch.setattr(proven, "RECORDS", folder / "proven.json")
    if text is not None:
        proven.RECORDS.write_text(text)
    return proven.records.__wrapped__()


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '{"proven": 1}', '{"proven": {"a": 1}}', None], ids=str)
def test_a_damaged_file_of_records_proves_nothing(text, tmp_path, monkeypatch):
    assert records_in(tmp_path, monkeypatch, text) == ()


def test_a_damaged_record_proves_nothing(tmp_path, monkeypatch):
    whole = record_of_linear()
    damaged = [1, None, [], *({**whole, name: value} for name in whole for value in (None, 1, [1]))]
    damaged += [{other: whole[other] for other in whole if other != name} for name in whole]
    assert records_in(tmp_path, monkeypatch, json.dumps({"proven": [*damaged, whole]})) == (whole,)


# once, from any thread, under any state of the caller


def calls_of_a_check(plant):
    planted = plant(ops.linear, builtins.linear)
    assert self_check.refusal(ops.linear, planted.backend, torch.float32, CPU) == ""
    return planted.calls


def test_a_check_runs_once(plant):
    checked = calls_of_a_check(plant)
    planted = plant(ops.linear, builtins.linear)
    for _ in range(5):
        linear_backends()
    assert planted.calls == checked + 5


def test_later_calls_look_up_only(plant):
    plant(ops.linear, builtins.linear)
    linear_backends()
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
    ops.linear(X, W)
    sys.setprofile(None)
    names = [code.co_name for code in called if code.co_filename in (self_check.__file__, proven.__file__)]
    assert names == ["dtype_of"]
    assert [code.co_name for code in called].count("doubt") == 1


def test_eight_threads_make_one_check(plant):
    checked = calls_of_a_check(plant)

    def slow(*arguments):
        time.sleep(0.005)
        return builtins.linear(*arguments)

    planted = plant(ops.linear, slow)
    start, found = threading.Barrier(8), []

    def first_use():
        start.wait()
        found.append(linear_backends())

    threads = [threading.Thread(target=first_use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [["cpu"]] * 8
    assert planted.calls == checked + 8


def test_a_kernel_that_calls_another_kernel_of_ours(plant):
    """Its check neither waits for itself nor starts another check."""
    inner = plant(ops.linear, builtins.linear)
    outer = plant(ops.feed_forward, lambda x, w1, b1, w2, b2, *rest: (
        ops.linear(builtins.linear_gelu(x, w1, b1, *rest)[0], w2, b2), builtins.linear_gelu(x, w1, b1, *rest)[1]
    ))  # fmt: skip
    assert self_check.refusal(ops.feed_forward, outer.backend, torch.float32, CPU) == ""
    assert inner.calls == 0
    assert linear_backends() == ["cpu"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_during_a_check(plant):
    """The child, in which the checking thread does not exist, makes the check itself."""
    flags = {"started": False, "go": False}  # no locks: a lock of the other thread would stay taken in the child

    def waiting(*arguments):
        flags["started"] = True
        while not flags["go"]:
            time.sleep(0.01)
        return builtins.linear(*arguments)

    plant(ops.linear, waiting)
    thread = threading.Thread(target=linear_backends)
    thread.start()
    while not flags["started"]:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        flags["go"] = True
        os._exit(0 if linear_backends() == ["cpu"] else 1)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    flags["go"] = True
    thread.join(60)
    assert done and status == 0


class Seen(TorchDispatchMode):
    """Which operators a caller's mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


STATES = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "a forced backend": lambda: ops.use_backend("cpu"),
    "a dispatch mode": Seen,
}


@pytest.mark.parametrize("name", [op.name for op in ops.ALL])
@pytest.mark.parametrize("state", STATES)
def test_a_check_does_not_see_the_callers_state(state, name, plant):
    op = OPS[name]
    planted = plant(op, op.backends["torch"].run)
    with STATES[state]():
        assert self_check.refusal(op, planted.backend, sample_calls.dtypes(op)[0], CPU) == ""


def state_of_torch():
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), torch.get_num_threads(), registry._forced.get(), torch.get_rng_state().tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_check_leaves_the_callers_state(state, plant):
    planted = plant(ops.linear, builtins.linear)
    with STATES[state]() as mode, ops.record() as calls:
        before = state_of_torch() if state != "meta by default" else None
        assert self_check.refusal(ops.linear, planted.backend, torch.float32, CPU) == ""
        seen = list(mode.names) if isinstance(mode, Seen) else []
        assert before is None or before == state_of_torch()
    assert calls == [] and "aten.linear.default" not in seen and "aten.addmm.default" not in seen


@pytest.mark.parametrize("state", [state for state in STATES if state != "a forced backend"])
def test_explain_does_not_see_the_callers_state(state):
    expected = samples.op_backends("cpu")
    with STATES[state]() as mode:
        assert samples.op_backends("cpu") == expected
        assert not isinstance(mode, Seen) or mode.names == []


def test_nothing_is_checked_in_a_trace(plant):
    from torch._subclasses.fake_tensor import FakeTensorMode

    planted = plant(ops.linear, builtins.linear)
    with FakeTensorMode():
        words = self_check.refusal(ops.linear, planted.backend, torch.float32, CPU)
        assert samples.op_backends("cpu")["linear"]["cpu"] == [words]
    assert words.endswith("cannot be in a trace or transform: run one forward before")
    assert planted.calls == 0
    assert linear_backends() == ["cpu"], "which was not kept"


def test_nothing_is_checked_while_a_cuda_graph_is_captured(plant, monkeypatch, caplog):
    planted = plant(ops.linear, builtins.linear)
    monkeypatch.setattr(devices, "card", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    words = self_check.refusal(ops.linear, planted.backend, torch.float32, torch.device("cuda", 0))
    assert words.endswith("cannot be in a CUDA graph: run one forward before the capture")
    assert (planted.calls, planted.backend.verdicts, caplog.records) == (0, {}, [])


def test_two_devices_of_one_card_share_a_check(plant, monkeypatch):
    monkeypatch.setattr(devices, "card", lambda device: "a card")
    checked = []
    monkeypatch.setattr(self_check, "first_use", lambda *given: checked.append(given[3]) or "wrong")
    planted = plant(ops.linear, builtins.linear)
    said = {self_check.refusal(ops.linear, planted.backend, torch.float32, torch.device("cuda", i)) for i in (0, 1)}
    assert said == {"it failed its self-check in float32 on a card: wrong"}
    assert checked == [torch.device("cuda", 0)]


# the calls themselves


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_sample_calls_are_calls(op):
    """Right arguments, real values, the same at every time, an empty row, and nothing of torch's own generator."""
    before = torch.get_rng_state()
    for dtype in sample_calls.dtypes(op):
        for sizes in (sample_calls.TYPICAL, *sample_calls.CHECKED):
            twice = [list(sample_calls.sample_calls(op, sizes, dtype)) for _ in range(2)]
            for first, second in zip(*twice, strict=True):
                assert op.check(*first.arguments) == [], first.what
                assert self_check.dtype_of(first.arguments) == dtype
                for a, b in zip(first.arguments, second.arguments, strict=True):
                    if isinstance(a, torch.Tensor):
                        assert torch.equal(a, b) and a.device == CPU
                        assert not a.is_floating_point() or a.numel() < 2 or a.std() > 0
    assert torch.equal(before, torch.get_rng_state())
    assert all(0 in sizes.lengths for sizes in sample_calls.CHECKED)


def test_no_two_rows_of_a_weight_are_alike():
    call = next(sample_calls.sample_calls(ops.feed_forward, sample_calls.TYPICAL, torch.float32))
    weight = call.arguments[1]
    assert torch.unique(weight, dim=0).shape == weight.shape
