"""torch.compile, torch.export, jit.trace and ONNX: right graphs of any shape; the model they come from stays fast."""

import io
import shutil

import onnxruntime
import pytest
import torch

from tests.ecosystem.common import NO_DROPOUT, assert_output, calls, gradients
from tests.models.small import batch, pair

pytestmark = [  # torch's own, of its older exporters
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning:torch"),
]

HEAD = ("BertForTokenClassification", "bert")
MADE_OF, OTHER = batch("bert", (20, 3)), batch("bert", (33, 1, 16, 7))
DYNAMIC = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in MADE_OF}


@pytest.fixture
def models():
    return pair(*HEAD, **NO_DROPOUT)


@pytest.fixture(autouse=True)
def _forget_compilations():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def real(logits, inputs):
    """The rows of real tokens."""
    return logits[inputs["attention_mask"] == 1]


@torch.no_grad()
def assert_logits(logits, inputs, models):
    """The parity rule on what a compiled or exported model gave; the model that it was made of is fast as before."""
    expected, model = models
    assert_output(real(logits, inputs), lambda m: real(m(**inputs).logits, inputs), expected)
    assert_output(real(model(**inputs).logits, inputs), lambda m: real(m(**inputs).logits, inputs), expected)
    assert set(calls(model)) <= {"", "a trace, an export, a transform or FakeTensorMode is at work"}
    assert calls(model)[""]


def mixes():
    """20 batches of 2 to 6 ragged texts, all of other lengths."""
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(2, 40, (2 + i % 5,), generator=draw).tolist()) for i in range(20)]


@torch.no_grad()
def test_compile_in_one_graph_and_at_most_twice(models):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(models[1], backend=backend, fullgraph=True)
    for lengths in mixes():
        inputs = batch("bert", lengths)
        assert_logits(compiled(**inputs).logits, inputs, models)
    assert 1 <= len(compilations) <= 2


@pytest.mark.slow
def test_compiled_gradients(models):
    expected, model = models
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)

    def step(forward, m):
        m.zero_grad()
        real(forward(**inputs).logits, inputs).square().mean().backward()
        return gradients(m)

    for lengths in mixes()[:3]:
        inputs = batch("bert", lengths)
        assert_output(step(compiled, model), lambda m: step(m, m), expected)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ to make code for a CPU")
@torch.no_grad()
def test_compile_by_inductor(models):
    compiled = torch.compile(models[1], fullgraph=True, dynamic=True)
    for inputs in (MADE_OF, OTHER):
        assert_logits(compiled(**inputs).logits, inputs, models)


@pytest.mark.parametrize("shapes", [None, DYNAMIC], ids=["one shape", "any shape"])
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict, shapes, models):
    program = torch.export.export(models[1], (), dict(MADE_OF), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    inputs = OTHER if shapes else MADE_OF
    assert_logits(torch.export.load(file).module()(**inputs).logits, inputs, models)


def test_trace(models):
    traced = torch.jit.trace(models[1], example_kwarg_inputs=dict(MADE_OF), strict=False)
    for inputs in (MADE_OF, OTHER):
        assert_logits(traced(**inputs)["logits"], inputs, models)


AXES = {name: {0: "texts", 1: "tokens"} for name in MADE_OF}
EXPORTERS = {
    "torchscript": {"dynamo": False, "dynamic_axes": AXES},
    "torch.export": {"dynamo": True, "dynamic_shapes": DYNAMIC},
}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_onnx(exporter, models, tmp_path):
    file = str(tmp_path / "model.onnx")
    names = {"input_names": list(MADE_OF), "output_names": ["logits"]}
    torch.onnx.export(models[1], (), file, kwargs=dict(MADE_OF), verbose=False, **names, **EXPORTERS[exporter])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for inputs in (MADE_OF, OTHER):
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert_logits(torch.from_numpy(logits), inputs, models)
