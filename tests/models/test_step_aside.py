"""Whatever the fast path does not compute takes HuggingFace's own path, gives its numbers, and says why."""

import re

import pytest
import torch
import transformers
from torch import nn

import fastbert
from tests.models.small import (
    ALL_BASES,
    ALL_HEADS,
    BASES,
    REFUSED,
    batch,
    head_batch,
    last_reason,
    pair,
    reasons,
    same_as_stock,
)  # fmt: skip

CALLS = {
    "embeddings of another dtype": (
        lambda i: {"inputs_embeds": torch.zeros(2, 3, 64, dtype=torch.bfloat16)},
        "inputs_embeds is torch.bfloat16, the model is not",
    ),
    "encoder states": (
        lambda i: dict(i, encoder_hidden_states=torch.zeros(4, 3, 64)),
        "encoder_hidden_states was given",
    ),
    "a softcap of nothing": (lambda i: dict(i, head_mask=torch.ones(1)), "head_mask was given"),
    "token types for one row": (
        lambda i: dict(i, token_type_ids=i["token_type_ids"][:1]),
        r"token_type_ids has shape \[1, 33\]",
    ),
    "left padding": (
        lambda i: dict(i, attention_mask=i["attention_mask"].flip(1), input_ids=i["input_ids"].flip(1)),
        "column 0 of a row is masked",
    ),
    "an empty row": (
        lambda i: dict(i, attention_mask=i["attention_mask"] * torch.tensor([1, 0, 1, 1])[:, None]),
        "column 0 of a row is masked",
    ),
    "4-D mask": (
        lambda i: dict(i, attention_mask=i["attention_mask"].bool()[:, None, None].expand(-1, 1, 33, -1)),
        r"attention_mask is not a tensor \[4, 33\]",
    ),
    "causal": (lambda i: dict(i, is_causal=True), "is_causal was given"),
    "attentions": (lambda i: dict(i, output_attentions=True), "attentions were asked for"),
    "broadcast positions": (
        lambda i: dict(i, position_ids=torch.zeros(4, 1, dtype=torch.long)),
        r"position_ids has shape \[4, 1\]",
    ),
}


@pytest.mark.parametrize("case", CALLS)
@torch.no_grad()
def test_a_call_that_asks_for_something_else(case, bert, inputs):
    expected, model = bert
    change, reason = CALLS[case]
    same_as_stock(expected, model, **change(inputs))
    assert re.search(reason, last_reason(model)), last_reason(model)


@torch.no_grad()
def test_a_cache_is_huggingfaces_affair(bert, inputs):
    expected, model = bert
    a, b = (m(**inputs, past_key_values=transformers.DynamicCache()).last_hidden_state for m in (expected, model))
    assert torch.equal(a, b) and "past_key_values was given" in last_reason(model)


@torch.no_grad()
def test_nothing_is_computed_while_an_outer_model_captures(bert, inputs):
    from transformers.utils.output_capturing import _active_collector

    expected, model = bert
    token = _active_collector.set({"attentions": []})
    try:
        same_as_stock(expected, model, **inputs)
    finally:
        _active_collector.reset(token)
    assert last_reason(model) == "an outer model captures outputs"


@pytest.mark.parametrize(
    ("family", "name"), [entry for entry in ALL_BASES + ALL_HEADS if entry[0] in REFUSED], ids=lambda x: x
)
@torch.no_grad()
def test_a_family_that_no_op_computes(family, name):
    """By import, by `accelerate`, and said in words; its pad rows are its own."""
    expected, model = pair(name, family)
    inputs = head_batch(name, family)
    same_as_stock(expected, model, **inputs)
    imported = getattr(fastbert, name)(expected.config).eval()
    imported.load_state_dict(expected.state_dict())
    same_as_stock(expected, imported, **inputs, output_hidden_states=True)
    reason = "MPNet adds a bias by relative position to its attention scores, which no op takes"
    assert reasons(model) == reasons(imported) == [reason] == fastbert.explain(model).models[0].reasons


def replace_linear(model):
    class Doubled(nn.Linear):
        pass

    query = model.encoder.layer[1].attention.self.query
    query.__class__ = Doubled


def replace_forward(model):
    layer = model.encoder.layer[0]
    layer.forward = layer.forward


def offload(model):
    model.encoder.layer[0].output.dense._hf_hook = object()


def hook(model):
    model.encoder.layer[1].register_forward_hook(lambda module, args, output: output)


def backward_hook(model):
    model.encoder.layer[0].register_full_backward_hook(lambda module, given, made: None)


def backward_pre_hook(model):
    model.encoder.layer[1].attention.self.query.register_full_backward_pre_hook(lambda module, made: None)


def replaced_chunk(model):
    model.encoder.layer[0].feed_forward_chunk = lambda x: x * 2


def causal_attention(model):
    model.encoder.layer[1].attention.self.is_causal = True


def relu_inside_gelu(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn.act = torch.relu


def relu(model):
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU().eval()


def callable_activation(model):
    intermediate = model.encoder.layer[1].intermediate
    del intermediate.intermediate_act_fn
    intermediate.intermediate_act_fn = torch.tanh


def becomes_a_decoder(model):
    model.config.is_decoder = True


MODELS = {
    "a config that becomes a decoder's": (becomes_a_decoder, "the model is a decoder"),
    "a subclass of Linear": (replace_linear, "encoder.layer.1.attention.self.query is"),
    "a replaced forward": (replace_forward, "the forward of encoder.layer.0 was replaced"),
    "an offloaded module": (offload, "encoder.layer.0.output.dense is offloaded"),
    "a backward hook": (backward_hook, "a hook is set on encoder.layer.0"),
    "a backward pre-hook": (backward_pre_hook, "a hook is set on encoder.layer.1.attention.self.query"),
    "a chunk of the feed-forward": (replaced_chunk, "the feed_forward_chunk of encoder.layer.0 was replaced"),
    "another function inside GELU": (relu_inside_gelu, "the activation is GELUActivation, not an erf or tanh GELU"),
    "a causal attention": (causal_attention, "encoder.layer.1.attention.self is causal"),
    "a user's hook on a layer": (hook, "a hook is set on encoder.layer.1"),
    "another activation": (relu, "the activation is ReLU, not an erf or tanh GELU"),
    "a callable activation": (callable_activation, "the activation is tanh, not an erf or tanh GELU"),
    "eager attention": (lambda m: m.set_attn_implementation("eager"), "eager attention was asked for, not sdpa"),
}


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_a_changed_model(case, bert, inputs):
    expected, model = bert
    change, reason = MODELS[case]
    model(**inputs)  # fast once: the change must be seen afterwards
    change(expected), change(model)
    same_as_stock(expected, model, **inputs)
    assert reason in last_reason(model)
    assert any(reason in r for r in fastbert.explain(model).models[0].reasons)


CONFIGS = {
    "a decoder": ({"is_decoder": True}, "the model is a decoder"),
    "cross-attention": ({"is_decoder": True, "add_cross_attention": True}, "the model has cross-attention"),
    "relu": ({"hidden_act": "relu"}, "the activation is ReLU, not an erf or tanh GELU"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
}


@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_a_config_that_changes_the_maths(case, inputs):
    changes, reason = CONFIGS[case]
    expected, model = pair("BertModel", "bert", **changes)
    same_as_stock(expected, model, **inputs)
    assert reason in last_reason(model)


@pytest.mark.parametrize(("family", "name"), BASES)
@torch.no_grad()
def test_left_padding(family, name):
    """Rows of pads come first: they are HuggingFace's, because its poolers read row 0."""
    expected, model = pair(name, family)
    inputs = {name: x.flip(1) for name, x in batch(family).items()}
    same_as_stock(expected, model, **inputs)
    assert "column 0 of a row is masked" in last_reason(model)


@torch.no_grad()
def test_tracing_and_compiling_take_the_stock_path(bert, inputs):
    expected, model = bert
    args = (inputs["input_ids"], inputs["attention_mask"])
    traced = torch.jit.trace(model, args, strict=False, check_trace=False)
    real = inputs["attention_mask"] == 1
    want = expected(*args).last_hidden_state[real]
    torch.testing.assert_close(traced(*args)["last_hidden_state"][real], want, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(*args).last_hidden_state[real], want, rtol=1e-4, atol=1e-4)
