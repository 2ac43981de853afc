"""Devices that the fast path does not run on: HuggingFace's own forward runs there, and the words say why.

Without the hardware, a model stands elsewhere by what its parameters say of their device; they hold real numbers.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import devices, doctor, native, ops, report
from fastbert.ops import samples
from tests.models.small import batch, config, reasons, stock


@pytest.fixture(autouse=True)
def _forget():
    """What is known of a device is kept; here it changes from test to test."""
    for function in (devices.card, devices.refusals):
        function.cache_clear()
    yield
    for function in (devices.card, devices.refusals):
        function.cache_clear()


class Elsewhere(nn.Parameter):
    """A parameter on the CPU that says it is on another device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    place = torch.device("cpu")

    @property
    def device(self):
        return self.place


def moved(model, device):
    """The model, whose parameters say that they are on another device."""
    kind = type("Elsewhere", (Elsewhere,), {"place": torch.device(device)})
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = kind(parameter.detach())
    return model


def a_card(monkeypatch, name, capability, hip=None):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


ONLY = "; the fast path runs on CPUs and NVIDIA GPUs"
PLACES = {
    "mps": ("mps:0", None, f"mps (an Apple GPU){ONLY}"),
    "xpu": ("xpu:0", None, f"xpu (an Intel GPU){ONLY}"),
    "hpu": ("hpu:0", None, f"hpu{ONLY}"),
    "ROCm": ("cuda:0", ("AMD Instinct MI300X", (9, 4), "6.4"), f"AMD Instinct MI300X, an AMD GPU (ROCm 6.4){ONLY}"),
    "an old card": (
        "cuda:0", ("NVIDIA GeForce GTX 1080 Ti", (6, 1)),
        "NVIDIA GeForce GTX 1080 Ti (sm_61); the fast path runs on NVIDIA GPUs from sm_75 on",
    ),
    "Volta": ("cuda:1", ("Tesla V100", (7, 0)), "Tesla V100 (sm_70); the fast path runs on NVIDIA GPUs from sm_75 on"),
    "a GPU out of reach": ("cuda:0", None, "cuda:0, of which torch can say nothing: "),
}  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@torch.no_grad()
def test_huggingfaces_forward_runs(where, monkeypatch):
    device, card, words = PLACES[where]
    if card is not None:
        a_card(monkeypatch, *card)
    elif device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("torch reaches a GPU here")
    inputs, expected = batch("bert"), stock("BertForMaskedLM", "bert")
    model = fastbert.accelerate(moved(stock("BertForMaskedLM", "bert"), device))
    with ops.record() as calls:
        ours = model(**inputs)
    assert torch.equal(ours.logits, expected(**inputs).logits)
    assert calls == []
    (reason,) = reasons(model)
    assert reason.startswith(f"the model is on {words}")
    told = fastbert.explain(model)
    assert [told.backends, told.kernels] == [{}, {}]
    assert f"because the model is on {words}" in str(told)
    assert "which backend runs an op" not in str(told)
    fastbert.restore(model)
    assert torch.equal(model(**inputs).logits, ours.logits)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (12, 0)])
def test_newer_cards_are_not_refused(capability, monkeypatch):
    a_card(monkeypatch, "NVIDIA card", capability)
    assert devices.refusals(torch.device("cuda", 0)) == ()
    assert devices.card(torch.device("cuda", 0)) == f"NVIDIA card (sm_{capability[0]}{capability[1]})"


@pytest.mark.parametrize("device", ["cuda:0", "mps:0", "meta"])
def test_a_card_that_nobody_can_ask_is_the_device(device):
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("torch reaches a GPU here")
    assert devices.card(torch.device(device)) == device


def test_the_card_of_a_cpu_names_its_vector_code():
    assert devices.refusals(torch.device("cpu")) == ()
    card = devices.card.__wrapped__  # without what is kept of earlier calls
    if not native.load().available:
        assert card(torch.device("cpu")).endswith(f" CPU ({torch.backends.cpu.get_cpu_capability()})")
        return
    best = native.isa()
    assert card(torch.device("cpu")).endswith(f" CPU ({best})")
    try:
        native.limit_isa("baseline")  # whose kernels are others, so another proof
        assert card(torch.device("cpu")).endswith(" CPU (baseline)")
    finally:
        native.limit_isa(best)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@torch.no_grad()
def test_a_meta_model_gives_shapes(family):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config(family)).eval()
        ids = torch.ones(2, 7, dtype=torch.long)
    shape = model(input_ids=ids).last_hidden_state.shape
    fastbert.accelerate(model)
    found = model(input_ids=ids)
    assert found.last_hidden_state.shape == shape == (2, 7, 64)
    assert found.last_hidden_state.device.type == "meta"
    assert reasons(model) == [f"the model is on meta (shapes without values){ONLY}"]
    assert "on meta (shapes without values)" in str(fastbert.explain(model))


@torch.no_grad()
def test_a_model_that_comes_from_meta_is_fast():
    """Reasons are of where the model is now."""
    with torch.device("meta"):
        model = fastbert.accelerate(transformers.AutoModel.from_config(config("bert")).eval())
        model(input_ids=torch.ones(2, 7, dtype=torch.long))
    model = model.to_empty(device="cpu")
    model.load_state_dict(stock("BertModel", "bert").state_dict())
    for name, buffer in stock("BertModel", "bert").named_buffers():
        model.get_buffer(name).copy_(buffer)
    model(**batch("bert"))
    assert reasons(model)[-1] == ""


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_backends_of_a_model_of_another_dtype(dtype):
    assert samples.op_backends("cpu", dtype).keys() == {op.name for op in ops.ALL}


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "cuda"])
def test_no_backend_is_asked_on_such_a_device(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("torch reaches a GPU here")
    assert samples.op_backends(device) == {}


def test_ops_run_on_tensors_of_a_device_without_autocast():
    x, weight = (torch.ones(3, 8, device="meta") for _ in range(2))
    with ops.use_backend("torch"):
        assert ops.linear(x, weight).shape == (3, 3)


@pytest.mark.parametrize("where", ["ROCm", "an old card"])
def test_doctor_names_the_devices(where, monkeypatch):
    _, card, words = PLACES[where]
    a_card(monkeypatch, *card)
    properties = SimpleNamespace(
        name=card[0], major=card[1][0], minor=card[1][1], multi_processor_count=1, total_memory=1
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = doctor.examine()
    assert found["devices"] == {"cpu": None, "cuda:0": words}
    on_cuda = [line for line in found["kernels"] if line["backend"] == "cuda"]
    assert {(line["state"], line["words"]) for line in on_cuda} == {("not run", words)}
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6", __spec__=True))
    assert doctor.triton() == {"version": "3.6", "reason": words}
    assert set(found["ops"]["linear"]) == {"cpu fp32", "cpu bf16"}
    assert len(report.doctor_tables(found)) == 4


def test_doctor_names_another_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert doctor.all_devices()["mps"] == PLACES["mps"][2]
