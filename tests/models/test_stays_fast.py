"""Calls and models out of the ordinary that stay on the fast path, with HuggingFace's numbers."""

import copy
from collections import Counter

import pytest
import torch
import transformers

import fastbert
from fastbert import hf
from tests.models.small import BASES, HEADS, assert_parity, batch, head_batch, pair, reasons, same_as_stock, stock


@torch.no_grad()
def test_the_pad_id_of_the_config_does_not_move_positions():
    expected, model = pair("RobertaModel", "roberta")
    inputs = batch("roberta")
    for pad in (0, None):
        for m in (expected, model):
            m.config.pad_token_id = pad
        assert_parity(expected, model, **inputs)


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
    assert reasons(model)[-1] == "33 tokens are no multiple of chunk_size_feed_forward 10"


@pytest.mark.parametrize("wanted", [1, -1, [0, 2], [], (5,), 0], ids=str)
@torch.no_grad()
def test_some_hidden_states_are_fast(wanted, bert, inputs):
    expected, model = bert
    if hf.hidden_state_indices(wanted, 3) is None:  # older versions know no indices
        same_as_stock(expected, model, **inputs, output_hidden_states=wanted)
        assert reasons(model)[0].startswith("output_hidden_states is no flag, and this version of transformers")
        return
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
def test_hidden_states_after_a_stock_forward_left_its_hooks(bert, inputs):
    expected, model = bert
    left = dict(inputs, attention_mask=inputs["attention_mask"].flip(1))
    model(**left, output_hidden_states=True)  # HuggingFace's own hooks now sit on the layers
    assert "column 0" in reasons(model)[-1]
    out = model(**inputs, output_hidden_states=True)
    assert reasons(model)[-1] == "" and len(out.hidden_states) == 3 and out.hidden_states[-1] is out.last_hidden_state
    real = inputs["attention_mask"] == 1
    for a, b in zip(expected(**inputs, output_hidden_states=True).hidden_states, out.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)


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
