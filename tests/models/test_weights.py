"""No weight is ever stale: whatever changes a parameter, the next forward computes with the new values."""

import pytest
import torch

from tests.models.small import assert_parity, reasons, stock


def edit_in_place(weight):
    weight.mul_(1.5)


def edit_data(weight):
    weight.data += torch.outer(torch.ones(weight.shape[0]), torch.linspace(0, 0.1, weight.shape[1]))


def replace_data(weight):
    weight.data = weight.data.flip(0).contiguous()


@pytest.mark.parametrize("edit", [edit_in_place, edit_data, replace_data])
@pytest.mark.parametrize(
    "which", ["attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"]
)
@torch.no_grad()
def test_no_weight_is_ever_stale(edit, which, bert, inputs):
    expected, model = bert
    model(**inputs)
    for m in (expected, model):
        edit(m.encoder.layer[1].get_submodule(which).weight)
    assert_parity(expected, model, **inputs)
    assert reasons(model) == [""]


@torch.no_grad()
def test_biases_and_norms_are_read_at_every_call(bert, inputs):
    expected, model = bert
    model(**inputs)
    for m in (expected, model):
        for parameter in m.parameters():
            if parameter.dim() == 1:
                parameter.data[3:5] += 0.5
    assert_parity(expected, model, **inputs)


def test_optimizer_steps_and_load_state_dict_are_seen(bert, inputs):
    expected, model = bert
    with torch.no_grad():
        model(**inputs)
    for m in (expected, model):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.05)
        m(**inputs).last_hidden_state[:, 0].square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        expected.load_state_dict(model.state_dict())  # the two runs' gradients differ by rounding
        assert_parity(expected, model, **inputs)
        fresh = stock("BertModel", "bert")
        model.load_state_dict(fresh.state_dict())
        assert_parity(fresh, model, **inputs)


@torch.no_grad()
def test_a_model_moved_to_another_dtype(bert, inputs):
    expected, model = bert
    model(**inputs)
    for dtype in (torch.bfloat16, torch.float32):
        expected.to(dtype), model.to(dtype)
        assert model(**inputs).last_hidden_state.dtype == dtype
        assert_parity(expected, model, **inputs)
    real = inputs["attention_mask"] == 1
    a, b = (m.double()(**inputs).last_hidden_state[real] for m in (expected, model))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # the rule has no reference above float64
    assert reasons(model) == [""]
