"""What is handed out can be used as HuggingFace's: gradients of hidden states, edits in place, devices by default."""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn

from fastbert.parity import judge
from tests.models.small import batch, pair, reasons


@pytest.fixture(params=["padded", "dense"])
def any_batch(request):
    return batch("bert") if request.param == "padded" else batch("bert", (16, 16))


def test_hidden_states_have_the_gradients_of_huggingface(bert, any_batch):
    """A hidden state is what the next layer reads, so saliency and hooks on hidden states see the model's gradient."""
    expected, model = bert
    found = []
    for m in (expected, model, copy.deepcopy(expected).double()):
        output = m(**any_batch, output_hidden_states=True)
        for hidden in output.hidden_states:
            hidden.retain_grad()
        output.last_hidden_state[:, 0].square().sum().backward()
        found.append([hidden.grad for hidden in output.hidden_states])
    real = any_batch["attention_mask"] == 1
    for base, ours, ref in zip(*found, strict=True):
        verdict = judge(ours[real], ref[real], base[real])
        assert verdict.passed, verdict
    assert reasons(model) == [""]


def test_a_hook_on_a_hidden_state_changes_the_gradients_below(bert, any_batch):
    _, model = bert
    output = model(**any_batch, output_hidden_states=True)
    output.hidden_states[1].register_hook(torch.zeros_like)
    output.last_hidden_state[:, 0].sum().backward()
    assert not model.embeddings.word_embeddings.weight.grad.any()
    assert model.encoder.layer[1].output.dense.weight.grad.any()


def test_the_output_can_be_edited_in_place(bert, any_batch):
    expected, model = bert
    gradients = []
    for m in (expected, model):
        hidden = m(**any_batch).last_hidden_state
        hidden[any_batch["attention_mask"] == 0] = -1e9
        hidden.max(1).values.sum().backward()
        gradients.append(m.encoder.layer[0].output.dense.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert reasons(model) == [""]


def test_an_output_made_without_gradients_can_be_edited_in_place(any_batch, bert):
    for m in bert:
        with torch.no_grad():
            hidden = m(**any_batch).last_hidden_state
        hidden += m.embeddings.LayerNorm.bias
        hidden[:, 0] = m.embeddings.LayerNorm.weight
        hidden.detach_()
    assert reasons(m) == [""]


def test_tables_and_biases_may_be_edited_between_forward_and_backward(bert, inputs):
    """HuggingFace's embedding and bias keep no values for their backward, so an optimizer may step in between."""
    expected, model = bert
    gradients = []
    for m in (expected, model):
        loss = m(**inputs).last_hidden_state[:, 0].square().sum()
        with torch.no_grad():
            for name, parameter in m.named_parameters():
                if "embeddings.weight" in name or name.endswith("dense.bias"):
                    parameter.mul_(1.5)
        loss.backward()
        gradients.append(m.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert reasons(model) == [""]


def test_a_weight_edited_between_forward_and_backward_is_an_error(bert, inputs):
    for m in bert:
        loss = m(**inputs).last_hidden_state[:, 0].square().sum()
        with torch.no_grad():
            m.encoder.layer[0].output.dense.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_default_device_does_not_matter(bert, inputs):
    expected, model = bert
    one = {name: x[1:2, :1] for name, x in inputs.items()}  # few rows take another product
    with torch.device("meta"):
        for call in (inputs, one):
            a, b = expected(**call).last_hidden_state, model(**call).last_hidden_state
            real = call["attention_mask"] == 1
            torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
        b.sum().backward()
        model.eval()
        with torch.no_grad():
            model(**one)
    assert reasons(model) == [""]


def test_a_forward_patched_by_class_is_seen_whatever_it_calls_itself(bert, inputs, monkeypatch):
    expected, model = bert
    kind: type[nn.Module] = type(model.encoder.layer[0].output)
    stock = kind.forward

    @functools.wraps(stock)
    def doubled(self, *args, **kwargs):
        return stock(self, *args, **kwargs) * 2

    with torch.no_grad():
        model(**inputs)
        monkeypatch.setattr(kind, "forward", doubled)
        assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
        assert reasons(model)[-1] == "the forward of BertOutput was replaced"
        monkeypatch.undo()
        monkeypatch.setattr(transformers.models.bert.modeling_bert.BertLayer, "feed_forward_chunk", lambda self, x: x)
        assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
        assert reasons(model)[-1] == "the feed_forward_chunk of BertLayer was replaced"
        monkeypatch.undo()
        model(**inputs)
    assert fast_calls(model) == 2


@torch.no_grad()
def test_a_users_pooler_reads_huggingfaces_pad_rows(bert, inputs):
    class Mean(nn.Module):
        def forward(self, hidden):
            return hidden.mean(1)

    expected, model = bert
    model(**inputs)
    for m in (expected, model):
        m.pooler = Mean()
    assert torch.equal(expected(**inputs).pooler_output, model(**inputs).pooler_output)
    assert reasons(model)[-1] == "the pooler is not the stock model's, and may read pad rows"
    dense = batch("bert", (16, 16))
    torch.testing.assert_close(expected(**dense).pooler_output, model(**dense).pooler_output, rtol=1e-4, atol=1e-5)
    assert fast_calls(model) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["_create_attention_masks", "__call__"])
def test_methods_replaced_on_a_class_are_seen(name, bert, inputs, monkeypatch):
    expected, model = bert
    kind = type(expected) if name.startswith("_c") else type(expected.encoder.layer[0])
    stock = getattr(kind, name)
    model(**inputs)
    monkeypatch.setattr(kind, name, lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert reasons(model)[-1] == f"the {name} of {kind.__name__} was replaced"


def fast_calls(model: nn.Module) -> int:
    return model._fastbert.calls[""]


def test_a_gradient_of_another_family():
    """ELECTRA's first hidden state is the projected one."""
    expected, model = pair("ElectraModel", "electra")
    found = []
    for m in (expected, model):
        output = m(**batch("electra"), output_hidden_states=True)
        output.hidden_states[0].retain_grad()
        output.last_hidden_state[:, 0].square().sum().backward()
        found.append(output.hidden_states[0].grad[batch("electra")["attention_mask"] == 1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
