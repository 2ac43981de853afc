"""What users do to live models: whatever it is, the accelerated model does what the stock one does."""

import contextlib
import copy
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import transformers
from torch import nn

import fastbert
from tests.models.small import assert_parity, batch, config, pair, reasons, stock


def attention_of(model, layer=0):
    return model.encoder.layer[layer].attention.self


def dropout_becomes_linear(model):
    torch.manual_seed(3)
    model.encoder.layer[0].output.dropout = nn.Linear(64, 64).eval()


def prune_a_head(model):
    from transformers.pytorch_utils import prune_linear_layer

    keep = torch.arange(48)
    for layer in model.encoder.layer:
        own = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(own, name, prune_linear_layer(getattr(own, name), keep))
        layer.attention.output.dense = prune_linear_layer(layer.attention.output.dense, keep, dim=1)
        own.all_head_size = 48
        own.num_attention_heads = 3
    model.eval()


def other_scaling(model):
    attention_of(model).scaling = 0.5


def edited_positions(model):
    model.embeddings.position_ids = model.embeddings.position_ids.flip(1)


def edited_token_types(model):
    model.embeddings.token_type_ids = 1 - model.embeddings.token_type_ids


def bias_of_all_three_removed(model):
    for name in ("query", "key", "value"):
        getattr(attention_of(model), name).bias = None


def assigned_twice(model):
    """A second new weight may get the address of the first."""
    out = model.encoder.layer[0].output.dense
    mask = torch.ones_like(out.weight)
    mask[0, 5] = -300.0
    for factor in (mask, torch.ones(1)):
        out.weight = nn.Parameter(out.weight * factor)


def through_numpy(model):
    model.encoder.layer[0].output.dense.weight.detach().numpy()[:] *= 1.5


def resized(model):
    torch.manual_seed(4)
    model.resize_token_embeddings(120)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.encoder.layer[0].output.dense)
    model.eval()


def untouched(model):
    pass


FAST = [prune_a_head, other_scaling, edited_positions, edited_token_types, bias_of_all_three_removed, assigned_twice,
        through_numpy, resized, untouched]  # fmt: skip


@pytest.mark.parametrize("change", FAST, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_that_the_fast_path_follows(change, bert, inputs):
    expected, model = bert
    model(**inputs)
    for m in bert:
        change(m)
    del inputs["token_type_ids"]  # so that the default of the buffer shows
    assert_parity(expected, model, **inputs)
    assert reasons(model) == [""]


def one_bias_removed(model):
    attention_of(model).query.bias = None


def max_norm(model):
    model.embeddings.token_type_embeddings.max_norm = 0.5


def plain_embedding_norm(model):
    model.embeddings.LayerNorm = nn.LayerNorm(64, elementwise_affine=False).eval()


def half_of_it_bf16(model):
    model.embeddings.word_embeddings.to(torch.bfloat16)


def masks_of_the_users(model):
    model._create_attention_masks = lambda **kwargs: (None, None)


def a_weight_that_is_no_parameter(model):
    dense = model.encoder.layer[0].output.dense
    weight = dense.weight.detach() * 1.5
    del dense.weight
    dense.weight = weight


def a_new_child(model):
    model.encoder.layer[0].adapter = nn.Linear(2, 2).eval()


def a_causal_config(model):
    model.config.is_causal = True


def a_sparse_weight(model):
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().to_sparse_csr())


STOCK = {
    a_causal_config: "the config asks for causal attention",
    a_sparse_weight: "a weight is laid out as torch.sparse_csr",
    dropout_becomes_linear: "encoder.layer.0.output.dropout is torch.nn.modules.linear.Linear, not torch.nn.Dropout",
    one_bias_removed: "of query, key and value some have a bias and some have not",
    max_norm: "an embedding has a max_norm",
    plain_embedding_norm: "a LayerNorm has no gain, no bias",
    half_of_it_bf16: "the parameters are not all torch.bfloat16",
    masks_of_the_users: "the _create_attention_masks of the model was replaced",
    a_weight_that_is_no_parameter: "a weight is Tensor, not torch.nn.Parameter",
    a_new_child: "encoder.layer.0.adapter is torch.nn.modules.linear.Linear",
    parametrized: "encoder.layer.0.output.dense is",
}


@pytest.mark.parametrize("change", STOCK, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_that_takes_the_stock_path(change, bert, inputs):
    expected, model = bert
    model(**inputs)
    for m in bert:
        change(m)
    assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert STOCK[change] in reasons(model)[-1]


@torch.no_grad()
def test_code_that_the_user_replaced(bert, inputs, monkeypatch):
    expected, model = bert
    model(**inputs)
    output = type(model.encoder.layer[0].output)
    own = output.forward
    monkeypatch.setattr(output, "forward", lambda self, *args: own(self, *args) * 2)
    assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert reasons(model)[-1] == "the forward of BertOutput was replaced"
    monkeypatch.undo()

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    transformers.AttentionInterface.register("sdpa", lambda *args, **kwargs: (sdpa(*args, **kwargs)[0] * 2, None))
    try:
        assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
        assert reasons(model)[-1] == "another attention is registered under the name sdpa"
    finally:
        transformers.AttentionInterface.register("sdpa", sdpa)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    model(**inputs)
    hook.remove()
    assert reasons(model)[-1] == "a hook on every module is set"
    calls = fastbert.explain(model).models[0].calls[""]
    model(**inputs)
    assert fastbert.explain(model).models[0].calls[""] == calls + 1


def test_the_first_forward_from_many_threads(inputs):
    """Each thread may be the one that looks at the model first: all get the serial answer, then and later."""
    expected = stock("BertModel", "bert", num_hidden_layers=4)
    with torch.no_grad():
        want = fastbert.accelerate(copy.deepcopy(expected))(**inputs).last_hidden_state
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            model, barrier, got = fastbert.accelerate(copy.deepcopy(expected)), threading.Barrier(4), []

            def work(model=model, barrier=barrier, got=got):
                barrier.wait()
                with torch.no_grad():
                    got.append(model(**inputs).last_hidden_state)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(got) == 4 and all(torch.equal(out, want) for out in got)
            with torch.no_grad():
                assert torch.equal(model(**inputs).last_hidden_state, want)
    finally:
        sys.setswitchinterval(interval)


@torch.no_grad()
def test_a_shallow_copy_with_other_modules_keeps_to_itself(bert, inputs):
    """What nn.DataParallel makes: replicas with the same __dict__ and other modules."""
    expected, model = bert
    other = copy.copy(model)
    other._modules = copy.deepcopy(dict(model._modules))
    for parameter in other.parameters():
        parameter.mul_(1.01)
    reference = copy.deepcopy(expected)
    for parameter in reference.parameters():
        parameter.mul_(1.01)
    for _ in range(2):
        assert_parity(expected, model, **inputs)
        assert_parity(reference, other, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluate_under_inference_mode_then_train(dtype, bert, inputs):
    _, model = bert
    model.to(dtype)
    with torch.inference_mode():
        model(**inputs)
    assert not any(p.is_inference() for p in model.parameters())
    model.train()(**inputs).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_memory_stays_where_the_user_sees_it(dtype, bert, inputs):
    _, model = bert
    model.to(dtype)
    addresses = [p.data_ptr() for p in model.parameters()]
    model(**inputs)
    fastbert.restore(model)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@torch.no_grad()
def test_tied_queries_and_keys(bert, inputs):
    for m in bert:
        m.float()
        attention_of(m).key.weight = attention_of(m).query.weight
    assert_parity(*bert, **inputs)
    assert reasons(bert[1]) == [""]


def test_parameters_made_under_inference_mode_are_never_stale(inputs):
    with torch.inference_mode():
        expected, model = pair("BertModel", "bert")
        model(**inputs)
        for m in (expected, model):
            m.encoder.layer[0].output.dense.weight[0, 5] = 50.0
        real = inputs["attention_mask"] == 1
        a, b = expected(**inputs).last_hidden_state[real], model(**inputs).last_hidden_state[real]
        assert reasons(model) == [""]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_deleted_model_frees_its_memory_at_once(inputs):
    _, model = pair("BertModel", "bert")
    with torch.no_grad():
        model(**inputs)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_autocast_leaves_float64_alone(bert, inputs):
    expected, model = (m.double() for m in bert)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)


def test_forward_mode_differentiation_takes_the_stock_path(bert, inputs):
    from torch.autograd import forward_ad

    _, model = bert
    model.requires_grad_(False).set_attn_implementation("eager")
    with torch.no_grad(), forward_ad.dual_level():
        embeds = model.embeddings.word_embeddings(inputs["input_ids"])
        dual = forward_ad.make_dual(embeds, torch.ones_like(embeds))
        out = model(inputs_embeds=dual, attention_mask=inputs["attention_mask"]).last_hidden_state
        assert forward_ad.unpack_dual(out).tangent is not None


@torch.no_grad()
def test_a_torch_without_the_fields_of_modules_takes_the_stock_path(bert, inputs, monkeypatch):
    expected, model = bert
    reason = "this torch lacks nn.Module._modules"
    monkeypatch.setattr("fastbert.torch_private.module_fields_refusal", lambda: reason)
    assert torch.equal(expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert reasons(model) == [reason]


@torch.no_grad()
def test_positions_that_cannot_be_counted_are_huggingfaces_affair():
    for model in pair("RobertaModel", "roberta"):
        model.embeddings.padding_idx = None
        with pytest.raises(TypeError):
            model(**batch("roberta"))
    assert reasons(model) == ["the embeddings have no padding_idx to count positions from"]


@pytest.mark.parametrize("name", ["softcap", "position_bias", "cache", "debug_io", "query", "dropout"])
@torch.no_grad()
def test_arguments_of_huggingfaces_inner_functions(name, bert, inputs):
    _, model = bert
    with contextlib.suppress(Exception):  # what they do is HuggingFace's affair
        model(**inputs, **{name: torch.zeros(1)})
    assert reasons(model) == [f"{name} was given"]


class Answers(transformers.BertForQuestionAnswering):
    pass


def test_a_subclass_of_a_question_answering_head_keeps_pad_rows_exact():
    model = fastbert.accelerate(Answers(config("bert", num_labels=2)).eval())
    assert fastbert.explain(model).models[0].pad_output == "exact"


@torch.no_grad()
def test_fake_and_meta_tensors_take_the_stock_path(inputs):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        model = fastbert.accelerate(transformers.BertModel(config("bert")).eval())
        assert model(torch.ones(2, 5, dtype=torch.long)).last_hidden_state.shape == (2, 5, 64)
        assert "FakeTensorMode is at work" in reasons(model)[-1]
    _, model = pair("BertModel", "bert")
    traced = make_fx(lambda ids: model(ids).last_hidden_state)(torch.ones(2, 5, dtype=torch.long))
    assert "at work" in reasons(model)[-1] and any("native_layer_norm" in str(n.target) for n in traced.graph.nodes)
    with torch.device("meta"):
        model = fastbert.accelerate(transformers.BertModel(config("bert")).eval())
        assert model(torch.ones(2, 5, dtype=torch.long)).last_hidden_state.shape == (2, 5, 64)
    assert "the model is on meta" in reasons(model)[-1]


@pytest.mark.parametrize(
    "bounds", [[0, 7, 8], [1, 8, 24], [0, 9, 8, 24], [0.0, 24.0], [24]], ids=["short", "late", "back", "float", "one"]
)
@torch.no_grad()
def test_malformed_flattened_input_takes_the_stock_path(bounds, bert):
    _, model = bert
    model(input_ids=torch.ones(1, 24, dtype=torch.long), cu_seq_lens_q=torch.tensor(bounds), max_length_q=16)
    assert "cu_seq_lens_q" in reasons(model)[-1]


@pytest.mark.parametrize("context", ["torch.inference_mode()", "torch.autocast('cpu')", "torch.device('meta')"])
def test_the_first_forward_of_a_process_in_any_context(context):
    """The probes of private names run once and must not see where they are first asked."""
    code = f"""
import torch, transformers, fastbert
model = fastbert.accelerate(transformers.BertModel(transformers.BertConfig(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32, vocab_size=50)).eval())
ids = torch.ones(2, 5, dtype=torch.long)
with torch.no_grad(), {context}:
    model(ids, attention_mask=torch.ones(2, 5, dtype=torch.long, device="cpu"))
with torch.no_grad():
    model(ids)
assert list(fastbert.explain(model).models[0].calls) == [""], fastbert.explain(model)
assert fastbert.explain(model).models[0].packed_bytes > 0
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
