"""The uses people learn BERT by, each as they write it: the accelerated model against the stock one."""

import json
import logging

import pytest
import torch
import transformers

import fastbert
from fastbert.parity import enliven
from tests.models.small import assert_parity, batch, config, pair, reasons, stock

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def both_losses(expected, model, **call):
    """The two losses after a backward, equal; every gradient near the stock one."""
    a, b = expected(**call), model(**call)
    torch.testing.assert_close(b.loss, a.loss, **CLOSE)
    a.loss.backward(), b.loss.backward()
    theirs = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    assert reasons(model) == [""]


# No mask


@torch.no_grad()
def test_ids_alone_are_all_attended():
    """No mask is inferred from pad ids: what a text's vector is depends on its padding, as in HuggingFace."""
    expected, model = pair("BertModel", "bert")
    ids = batch("bert")["input_ids"]
    assert (ids == expected.config.pad_token_id).any()
    assert_parity(expected, model, input_ids=ids)
    alone = model(ids[3:, :7]).last_hidden_state
    assert not torch.allclose(model(ids).last_hidden_state[3:, :7], alone, atol=1e-2)
    assert model(ids).last_hidden_state.ne(0).all() and reasons(model) == [""]


# Configs


LEGACY = {  # config.json of bert-base-chinese, sizes apart
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "directionality": "bidi",
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "model_type": "bert",
    "output_past": True,
    "pad_token_id": 0,
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
    "position_embedding_type": "absolute",
    "transformers_version": "4.1.1",
    "type_vocab_size": 2,
    "use_cache": True,
}


def save_legacy(folder, **changes):
    """A checkpoint as an old transformers saved it."""
    stock("BertForMaskedLM", "bert").save_pretrained(folder)
    path = folder / "config.json"
    sizes = {name: value for name, value in json.loads(path.read_text()).items() if name not in LEGACY}
    path.write_text(json.dumps({**sizes, **LEGACY, **changes}))


def test_a_legacy_config_keeps_every_field(tmp_path):
    save_legacy(tmp_path / "old")
    for cls in ("BertForMaskedLM", "AutoModelForMaskedLM", "BertModel"):
        for source in (transformers, fastbert):
            model = getattr(source, cls).from_pretrained(tmp_path / "old")
            model.save_pretrained(tmp_path / source.__name__)
        theirs, ours = (tmp_path / name / "config.json" for name in ("transformers", "fastbert"))
        assert ours.read_bytes() == theirs.read_bytes()
        fields = json.loads(ours.read_text())
        kept = {name: fields.get(name) for name in LEGACY if name not in ("architectures", "transformers_version")}
        # transformers itself drops this one of all
        assert kept == {n: LEGACY[n] for n in kept} | {"gradient_checkpointing": fields.get("gradient_checkpointing")}
    with torch.no_grad():
        model.eval()(**batch("bert"))
    assert reasons(model) == [""]


@pytest.mark.parametrize("made", ["from_pretrained", "auto", "accelerate"])
def test_relative_positions_are_warned_of(made, tmp_path, caplog, inputs):
    """transformers 5 runs such a model with absolute positions, which are not what it was trained with, silently."""
    save_legacy(tmp_path, position_embedding_type="relative_key_query")
    with caplog.at_level(logging.WARNING, "fastbert"):
        if made == "accelerate":
            model = fastbert.accelerate(transformers.BertForMaskedLM.from_pretrained(tmp_path))
        else:
            cls = fastbert.BertForMaskedLM if made == "from_pretrained" else fastbert.AutoModelForMaskedLM
            model = cls.from_pretrained(tmp_path)
        fastbert.accelerate(model)
    said = [record.getMessage() for record in caplog.records if record.name == "fastbert"]
    assert len(said) == 1 and said[0].startswith("position_embedding_type is 'relative_key_query', not 'absolute'")
    expected = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, expected(**inputs).logits)
    assert reasons(model) == ["position_embedding_type is 'relative_key_query', not 'absolute'"]


def test_absolute_positions_are_not_warned_of(tmp_path, caplog):
    save_legacy(tmp_path)
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.BertForMaskedLM.from_pretrained(tmp_path)
    assert [record for record in caplog.records if record.name == "fastbert"] == []


def swish(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
@torch.no_grad()
def test_activations_by_name(act, inputs):
    expected, model = pair("BertModel", "bert", hidden_act=act)
    assert_parity(expected, model, **inputs)
    if act.startswith("gelu"):
        assert reasons(model) == [""]
    else:
        assert "not an erf or tanh GELU" in reasons(model)[0]


@torch.no_grad()
def test_an_activation_that_is_a_function(inputs):
    """transformers 5 takes no function in a config; a model takes anything that can be called."""
    for cls in (transformers.BertModel, fastbert.BertModel):
        with pytest.raises(Exception, match="hidden_act"):
            cls(config("bert", hidden_act=swish))
    expected, model = pair("BertModel", "bert")
    for layer in (*expected.encoder.layer, *model.encoder.layer):
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = swish
    assert torch.equal(model(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)
    assert reasons(model) == ["the activation is swish, not an erf or tanh GELU"]


# Hidden states and attentions


@torch.no_grad()
def test_hidden_states_and_attentions(inputs):
    expected, model = pair("BertForSequenceClassification", "bert")
    real = inputs["attention_mask"] == 1
    a, b = expected(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True)
    assert len(a.hidden_states) == len(b.hidden_states) == 3 and reasons(model) == [""]
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(y[real], x[real], **CLOSE)
    for m in (expected, model):
        m.set_attn_implementation("eager")
    a, b = expected(**inputs, output_attentions=True), model(**inputs, output_attentions=True)
    assert len(a.attentions) == len(b.attentions) == 2 and torch.equal(a.logits, b.logits)
    for x, y in zip(a.attentions, b.attentions, strict=True):
        assert x.shape == (4, 4, 33, 33) and torch.equal(x, y)
    assert reasons(model)[-1] == "eager attention was asked for, not sdpa"
    for m in (expected, model):
        m.set_attn_implementation("sdpa")
    model(**inputs)
    assert fastbert.explain(model).models[0].calls[""] == 2


# Classification


def test_sentence_classification(inputs):
    expected, model = pair("BertForSequenceClassification", "bert")
    del inputs["token_type_ids"]
    both_losses(expected, model, **inputs, labels=torch.tensor([2, 0, 1, 1]))


def test_regression(inputs):
    expected, model = pair("BertForSequenceClassification", "bert", num_labels=1)
    both_losses(expected, model, **inputs, labels=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    assert model.config.problem_type == "regression"


def test_pair_and_multi_label_classification(inputs):
    changes = {"problem_type": "multi_label_classification"}
    expected, model = pair("BertForSequenceClassification", "bert", **changes)
    both_losses(expected, model, **inputs, labels=torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]))


@torch.no_grad()
def test_answer_matching(inputs):
    """A cross-encoder: one label, its sigmoid as the score of a pair of texts."""
    expected, model = pair("BertForSequenceClassification", "bert", num_labels=1)
    theirs, ours = (torch.sigmoid(m(**inputs).logits[:, 0]) for m in (expected, model))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(ours.argsort(), theirs.argsort()) and reasons(model) == [""]


def test_named_entities(inputs):
    expected, model = pair("BertForTokenClassification", "bert")
    labels = torch.randint(0, 3, inputs["input_ids"].shape).masked_fill(inputs["attention_mask"] == 0, -100)
    both_losses(expected, model, **inputs, labels=labels)


def test_question_answering():
    expected, model = pair("BertForQuestionAnswering", "bert")
    spans = {"start_positions": torch.tensor([3, 0]), "end_positions": torch.tensor([4, 0])}
    both_losses(expected, model, **batch("bert", (16, 16)), **spans)


def test_multiple_choice(inputs):
    expected, model = pair("BertForMultipleChoice", "bert")
    call = {name: x.view(2, 2, -1) for name, x in inputs.items()}
    both_losses(expected, model, **call, labels=torch.tensor([1, 0]))


def test_next_sentence_prediction(inputs):
    expected, model = pair("BertForNextSentencePrediction", "bert")
    both_losses(expected, model, **inputs, labels=torch.tensor([1, 0, 0, 1]))


def test_pre_training(inputs):
    """Masked tokens and next sentences in one loss, the output matrix tied to the words."""
    expected, model = pair("BertForPreTraining", "bert")
    chosen = (torch.rand(inputs["input_ids"].shape) < 0.3) & (inputs["attention_mask"] == 1)
    labels = inputs["input_ids"].masked_fill(~chosen, -100)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(chosen, 4)
    both_losses(expected, model, **inputs, labels=labels, next_sentence_label=torch.tensor([0, 1, 1, 0]))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


# Generation


def decoding(**changes):
    return {"is_decoder": True, "bos_token_id": 2, "eos_token_id": 3, **changes}


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_generate(mode):
    expected, model = pair("BertLMHeadModel", "bert", **decoding())
    imported = fastbert.BertLMHeadModel(expected.config).eval()
    imported.load_state_dict(expected.state_dict())
    ids = torch.randint(5, 90, (2, 4))
    texts = []
    for m in (expected, model, imported):
        torch.manual_seed(0)
        texts.append(m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, **mode))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert reasons(model) == ["the model is a decoder"] or reasons(model)[0].startswith("the model is a decoder")


@torch.no_grad()
def test_encoder_and_decoder_generate(inputs):
    torch.manual_seed(0)
    both = transformers.EncoderDecoderModel(
        encoder=stock("BertModel", "bert"),
        decoder=stock("BertLMHeadModel", "bert", **decoding(add_cross_attention=True)),
    ).eval()
    both.config.decoder_start_token_id, both.config.pad_token_id = 2, 0
    labels = torch.randint(5, 90, (4, 6))
    want = both(**inputs, labels=labels)
    call = dict(inputs, max_new_tokens=6, decoder_start_token_id=2, pad_token_id=0)
    del call["token_type_ids"]
    text = both.generate(**call)
    fastbert.accelerate(both)
    got = both(**inputs, labels=labels)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    assert torch.equal(both.generate(**call), text)
    paths = {m.name: set(m.calls) for m in fastbert.explain(both).models}
    assert paths["encoder"] == {""} and all("decoder" in reason for reason in paths["decoder.bert"])


# Chinese text


def test_chinese_text(tmp_path):
    """A vocabulary of characters, generated; pairs of texts, padded by the tokenizer."""
    characters = sorted(set("今天天气很好我们去公园玩吧他不喜欢吃苹果。，？"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, "bert", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = transformers.BertForMaskedLM(config("bert", vocab_size=len(words))).eval()
    enliven(model)
    texts = ["今天天气很好，我们去公园玩吧。", "他不喜欢吃[MASK]果。", "berts"]
    inputs = tokenizer(texts, ["吃苹果？", "好", "火"], padding=True, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][2])
    assert tokens[:6] == ["[CLS]", "bert", "##s", "[SEP]", "[UNK]", "[SEP]"] and inputs["token_type_ids"].sum() > 3
    with torch.no_grad():
        want = model(**inputs).logits
        got = fastbert.accelerate(model)(**inputs).logits
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(got[real], want[real], **CLOSE)
    masked = inputs["input_ids"] == tokenizer.mask_token_id
    assert tokenizer.decode(got[masked].argmax(-1)) == tokenizer.decode(want[masked].argmax(-1))
    assert reasons(model) == [""]


# A short fit


def test_a_text_classifier_learns(inputs):
    """Fine-tuning with dropout, on the fast path."""
    torch.manual_seed(0)
    model = fastbert.BertForSequenceClassification(config("bert")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels, losses = torch.tensor([2, 0, 1, 1]), []
    for _ in range(20):
        loss = model(**inputs, labels=labels).loss
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert reasons(model) == [""]
