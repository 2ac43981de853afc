"""Whatever the fast path does not compute takes HuggingFace's own path, gives its numbers, and says why."""

import copy
import logging
import re
import threading
from collections import Counter

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import hf
from tests.models.small import (
    ALL_BASES,
    ALL_HEADS,
    BASES,
    HEADS,
    REFUSED,
    assert_parity,
    batch,
    head_batch,
    pair,
    reasons,
    stock,
)

EXACT = {"rtol": 0.0, "atol": 0.0}


def same_as_stock(expected, model, **inputs):
    a, b = expected(**inputs), model(**inputs)
    for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, **EXACT)


def last_reason(model):
    return reasons(model)[-1]


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


REJECTED = {
    "3-D mask": (
        lambda i: dict(i, attention_mask=i["attention_mask"].unsqueeze(1).expand(-1, 33, -1)),
        "attention_mask is not a tensor [4, 33]",
    ),
    "mask of another width": (
        lambda i: dict(i, attention_mask=i["attention_mask"][:, :5]),
        "attention_mask is not a tensor [4, 33]",
    ),
    "ids and embeddings": (lambda i: dict(i, inputs_embeds=torch.zeros(4, 33, 64)), "not exactly one of input_ids"),
    "neither": (lambda i: {}, "not exactly one of input_ids"),
    "an empty batch": (lambda i: {k: v[:0] for k, v in i.items()}, "the batch is empty: [0, 33]"),
    "longer than the table": (
        lambda i: {"input_ids": torch.ones(1, 60, dtype=torch.long)},
        "sequences of 60 tokens are longer than the position table allows",
    ),
    "id past the vocabulary": (
        lambda i: {"input_ids": torch.full((1, 4), 1000)},
        "input_ids reaches outside its table of 99 rows",
    ),
    "an id of -100 at a masked position": (
        lambda i: dict(i, input_ids=i["input_ids"] - 100 * (1 - i["attention_mask"])),
        "input_ids reaches outside its table",
    ),
    "position past the table": (
        lambda i: {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.full((1, 4), 99)},
        "position_ids reaches outside its table of 50 rows",
    ),
    "a token type past its table": (
        lambda i: dict(i, token_type_ids=i["token_type_ids"] + 1),
        "token_type_ids reaches outside its table of 2 rows",
    ),
    "ids of int16": (
        lambda i: dict(i, input_ids=i["input_ids"].to(torch.int16)),
        "input_ids is torch.int16, not int64 or int32",
    ),
    "an inner argument": (lambda i: dict(i, scaling=1.0), "scaling was given"),
    "embeddings of another width": (
        lambda i: {"inputs_embeds": torch.zeros(2, 3, 32)},
        "inputs_embeds has 32 channels, the tables have 64",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
@torch.no_grad()
def test_what_huggingface_rejects_is_rejected(case, bert, inputs):
    expected, model = bert
    change, reason = REJECTED[case]
    call = change(inputs)
    with pytest.raises(Exception) as theirs:
        expected(**call)
    with pytest.raises(theirs.type):
        model(**call)
    assert reason in last_reason(model)


REJECTED_BY_FAMILY = {
    "a task type past its table": ("ernie", {"task_type_ids": 3}, "task_type_ids reaches outside its table of 3 rows"),
    "task types for each choice": (
        "ernie", {"task_type_ids": torch.zeros(1, 4, 33, dtype=torch.long)},
        "task_type_ids has shape [1, 4, 33], not [4, 33]",
    ),
    "embeddings as wide as the layers": (
        "electra", {"input_ids": None, "inputs_embeds": torch.zeros(4, 33, 64)},
        "inputs_embeds has 64 channels, the tables have 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED_BY_FAMILY)
@torch.no_grad()
def test_what_one_family_rejects_is_rejected(case):
    family, changes, reason = REJECTED_BY_FAMILY[case]
    expected, model = pair({"ernie": "ErnieModel", "electra": "ElectraModel"}[family], family)
    inputs = batch(family)
    for name, value in changes.items():
        inputs[name] = inputs[name] + value if isinstance(value, int) else value
    with pytest.raises(Exception) as theirs:
        expected(**inputs)
    with pytest.raises(theirs.type):
        model(**inputs)
    assert reason in last_reason(model)


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


@torch.no_grad()
def test_arguments_given_twice_or_too_many_are_rejected(bert, inputs):
    for model in bert:
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(inputs["input_ids"], input_ids=inputs["input_ids"])
        with pytest.raises(TypeError, match=r"positional arguments|multiple values"):
            model(*[None] * 20)


@torch.no_grad()
def test_the_pad_id_of_the_config_does_not_move_positions():
    expected, model = pair("RobertaModel", "roberta")
    inputs = batch("roberta")
    for pad in (0, None):
        for m in (expected, model):
            m.config.pad_token_id = pad
        assert_parity(expected, model, **inputs)


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


@torch.no_grad()
def test_chunked_feed_forward_is_fast(inputs):
    """It bounds memory and changes no number."""
    expected, model = pair("BertModel", "bert", chunk_size_feed_forward=11)
    assert_parity(expected, model, **inputs)
    assert reasons(model) == [""]
    for m in (expected, model):
        m.config.chunk_size_feed_forward = m.encoder.layer[0].chunk_size_feed_forward = 10
        with pytest.raises(ValueError, match="multiple of the chunk size"):
            m(**inputs)
    assert last_reason(model) == "33 tokens are no multiple of chunk_size_feed_forward 10"


@pytest.mark.parametrize("wanted", [1, -1, [0, 2], [], (5,), 0], ids=str)
@torch.no_grad()
def test_some_hidden_states_are_fast(wanted, bert, inputs):
    expected, model = bert
    real = inputs["attention_mask"] == 1
    a, b = (m(**inputs, output_hidden_states=wanted).hidden_states for m in (expected, model))
    assert reasons(model) == [""] and (a is None) == (b is None)
    for x, y in zip(a or (), b or (), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y[real], x[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_python"])
@torch.no_grad()
def test_other_gelus_are_fast(activation, inputs):
    expected, model = pair("BertModel", "bert", hidden_act=activation)
    a, b = expected(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
    assert reasons(model) == [""]


def test_gradients_and_training_are_fast(bert, inputs):
    """Gradients of the weights, of inputs_embeds under frozen weights, in eval and in training mode."""
    _, model = bert
    model(**inputs).last_hidden_state.sum().backward()
    model.train()(**inputs).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    embeds = torch.randn(4, 33, 64, requires_grad=True)
    model.requires_grad_(False)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])[0].sum().backward()
    assert embeds.grad is not None and embeds.grad[inputs["attention_mask"] == 0].eq(0).all()
    assert reasons(model) == [""]


@torch.no_grad()
def test_dropout_of_nothing_changes_nothing(bert, inputs):
    expected, model = bert
    model.encoder.layer[0].output.dropout.p = 0.0
    model.encoder.layer[0].output.dropout.train()
    assert_parity(expected, model, **inputs)
    assert reasons(model) == [""]


@torch.no_grad()
def test_encoder_and_decoder(inputs):
    encoder, decoder = (
        stock("BertModel", "bert"),
        stock("BertLMHeadModel", "bert", is_decoder=True, add_cross_attention=True),
    )
    both = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model = fastbert.accelerate(copy.deepcopy(both))
    ids = torch.randint(5, 90, (4, 6))
    a = both(**inputs, decoder_input_ids=ids)
    b = model(**inputs, decoder_input_ids=ids)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    paths = {m.name: list(m.calls) for m in fastbert.explain(model).models}
    assert paths["encoder"] == [""] and "decoder" in paths["decoder.bert"][0]


@torch.no_grad()
def test_flattened_input_is_right_where_stock_is_not():
    expected, model = pair("BertModel", "bert")
    texts = [torch.randint(5, 90, (1, n)) for n in (7, 1, 16)]
    cu_seqlens = torch.tensor([0, 7, 8, 24], dtype=torch.int32)
    flat = {
        "input_ids": torch.cat(texts, 1),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 16,
        "max_length_k": 16,
    }
    alone = torch.cat([expected(input_ids=t).last_hidden_state for t in texts], 1)
    torch.testing.assert_close(model(**flat).last_hidden_state, alone, rtol=1e-4, atol=1e-4)
    assert reasons(model) == [""]


@pytest.mark.parametrize(("family", "name"), BASES)
@torch.no_grad()
def test_masks_of_any_dtype_holes_and_no_mask(family, name):
    expected, model = pair(name, family)
    inputs = batch(family)
    mask = inputs["attention_mask"].clone()
    mask[0, 5:9] = 0
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.int32, torch.float32, torch.float16, torch.float64):
        for scale in (1, -3) if dtype not in (torch.bool, torch.uint8, torch.uint16) else (1,):
            assert_parity(expected, model, **dict(inputs, attention_mask=(mask * scale).to(dtype)))
    del inputs["attention_mask"]  # then every token is attended, pad ids too
    assert_parity(expected, model, **inputs)
    assert reasons(model) == [""]


@pytest.mark.parametrize(("family", "name"), BASES)
@torch.no_grad()
def test_left_padding(family, name):
    """Rows of pads come first: they are HuggingFace's, because its poolers read row 0."""
    expected, model = pair(name, family)
    inputs = {name: x.flip(1) for name, x in batch(family).items()}
    same_as_stock(expected, model, **inputs)
    assert "column 0 of a row is masked" in last_reason(model)


@torch.no_grad()
def test_inputs_embeds_positional_arguments_and_position_ids(bert, inputs):
    expected, model = bert
    real = inputs["attention_mask"] == 1
    embeds = expected.embeddings.word_embeddings(inputs["input_ids"])
    positions = torch.arange(33).flip(0)[None]
    calls = [
        ((), {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}),
        ((inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]), {}),
        ((inputs["input_ids"],), {"attention_mask": inputs["attention_mask"], "position_ids": positions}),
        ((inputs["input_ids"],), {"attention_mask": inputs["attention_mask"], "position_ids": positions.expand(4, -1)}),
        ((), dict(inputs, an_unknown_argument=1)),
    ]
    for args, kwargs in calls:
        a, b = expected(*args, **kwargs).last_hidden_state, model(*args, **kwargs).last_hidden_state
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
    assert reasons(model) == [""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "name"), [("bert", "BertModel"), ("electra", "ElectraModel")])
@torch.no_grad()
def test_autocast_gives_the_dtypes_of_huggingface(family, name, dtype):
    """ELECTRA's projection of the embeddings gives the low dtype, the layers behind it do not."""
    expected, model = pair(name, family)
    inputs = batch(family)
    with torch.autocast("cpu", dtype):
        a, b = (m(**inputs, output_hidden_states=True) for m in (expected, model))
        assert_parity(expected, model, **inputs)
    for x, y in zip((*a.hidden_states, a[1]), (*b.hidden_states, b[1]), strict=True):
        assert not isinstance(x, torch.Tensor) or x.dtype == y.dtype
    full = model(**inputs).last_hidden_state
    assert full.dtype == torch.float32 and not torch.equal(full, b.last_hidden_state)
    assert reasons(model) == [""]


@torch.no_grad()
def test_a_missing_private_name_means_the_stock_path_and_one_warning(bert, inputs, monkeypatch, caplog):
    expected, _ = bert
    import transformers.utils.output_capturing as capturing

    hf.missing.cache_clear()
    monkeypatch.delattr(capturing, "_CAN_RECORD_REGISTRY")
    try:
        with caplog.at_level(logging.WARNING, "fastbert"):
            model = fastbert.accelerate(copy.deepcopy(stock("BertModel", "bert")))
            monkeypatch.undo()
            for _ in range(2):
                same_as_stock(expected, model, **inputs)
        said = [r.message for r in caplog.records if r.name == "fastbert"]
        name = "transformers.utils.output_capturing._CAN_RECORD_REGISTRY"
        assert said == [f"fastbert runs HuggingFace's own path: transformers lacks {name}"]
        assert "lacks" in last_reason(model)
    finally:
        hf.missing.cache_clear()


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


@torch.no_grad()
def test_hidden_states_after_a_stock_forward_left_its_hooks(bert, inputs):
    expected, model = bert
    left = dict(inputs, attention_mask=inputs["attention_mask"].flip(1))
    model(**left, output_hidden_states=True)  # HuggingFace's own hooks now sit on the layers
    assert "column 0" in last_reason(model)
    out = model(**inputs, output_hidden_states=True)
    assert reasons(model)[-1] == "" and len(out.hidden_states) == 3 and out.hidden_states[-1] is out.last_hidden_state
    real = inputs["attention_mask"] == 1
    for a, b in zip(expected(**inputs, output_hidden_states=True).hidden_states, out.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)


def test_threads_give_the_serial_answer(bert):
    _, model = bert
    batches = [batch("bert", lengths) for lengths in ((33, 1, 16, 7), (5, 5), (1,), (40, 2, 2))]
    with torch.no_grad():
        serial = [model(**b).last_hidden_state for b in batches]
    got: dict[int, torch.Tensor] = {}

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                got[index] = model(**batches[index]).last_hidden_state

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(serial):
        assert torch.equal(got[index], want)


ELIGIBLE = {
    "padded": lambda i: i,
    "no mask": lambda i: {k: v for k, v in i.items() if k != "attention_mask"},
    "a mask of bool": lambda i: dict(i, attention_mask=i["attention_mask"].bool()),
    "ids of int32": lambda i: dict(i, input_ids=i["input_ids"].int()),
    "hidden states": lambda i: dict(i, output_hidden_states=True),
    "a tuple": lambda i: dict(i, return_dict=False),
}
LENGTHS = ((33, 1, 16, 7), (1,), (16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_eligible_forwards_are_fast(dtype):
    """The share of fast forwards over every family, head and kind of call that is eligible: at least 95%."""
    calls = Counter()
    for family, name in BASES + HEADS:
        if "LMHead" in name or "CausalLM" in name:
            continue  # decoders are not eligible
        _, model = pair(name, family)
        model.to(dtype)
        for kind, change in ELIGIBLE.items():
            for lengths in LENGTHS:
                if "QuestionAnswering" in name and kind != "no mask" and len(set(lengths)) > 1:
                    continue  # its pad rows are kept exact
                model(**change(head_batch(name, family, lengths)))
        calls.update(fastbert.explain(model).models[0].calls)
    assert calls[""] >= 0.95 * calls.total() > 400, calls
