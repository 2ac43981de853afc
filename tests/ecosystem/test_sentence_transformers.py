import copy
import random
import tempfile

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer, util
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from transformers import modeling_flash_attention_utils
from transformers.utils import generic

import fastbert
from fastbert.checkpoint import demo_folder
from tests.ecosystem.common import NO_DROPOUT, assert_same, assert_trains_alike, calls, gradients

TEXTS = ["w5 w6 w7", "w8", "w9 " * 30, "w10 w11 nonsense", "w12 w13 w14 w15 w16"]


def encode(texts=TEXTS, **options):
    return lambda model: model.encode(texts, convert_to_tensor=True, batch_size=3, **options)


def both(cls, folder, **options):
    """A stock model of the library and an accelerated copy."""
    expected = cls(folder, device="cpu", **options)
    return expected, fastbert.accelerate(copy.deepcopy(expected))


def test_saved_in_int8_it_is_loaded_in_int8(saved, tmp_path):
    model = fastbert.accelerate(fastbert.quantize(SentenceTransformer(saved("BertModel", "bert"), device="cpu")))
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert fastbert.explain(fastbert.accelerate(loaded)).models[0].quantized
    assert torch.equal(encode()(model), encode()(loaded))


@pytest.mark.parametrize("options", [{}, {"normalize_embeddings": True}, {"prompt": "w20 w21 "}], ids=str)
def test_encode(options, saved):
    expected, model = both(SentenceTransformer, saved("BertModel", "bert"))
    assert_same(encode(**options), expected, model)
    assert calls(model) == {"": 2}  # two batches


def test_minilm_finds_the_same_answers():
    expected, model = both(SentenceTransformer, str(demo_folder()))
    corpus = ["A cat sits on the mat.", "Stocks fell sharply on Monday.", "How do I bake bread?", "Rain is expected."]
    query = "What will the weather be like tomorrow, and should I take an umbrella to work?"
    assert_same(encode([*corpus, query]), expected, model)
    assert_same(lambda m: util.cos_sim(encode([query])(m), encode(corpus)(m)), expected, model)
    (hits,) = util.semantic_search(encode([query])(model), encode(corpus)(model))
    assert corpus[hits[0]["corpus_id"]] == "Rain is expected." and set(calls(model)) == {""}


@pytest.fixture
def flash_attention(monkeypatch):
    """The library packs its inputs where flash attention was asked for and installed; here it believes that it is."""
    monkeypatch.setattr(generic, "is_flash_attention_requested", lambda **kwargs: True)
    functions = (None, object(), None, None, None), (None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args: functions)


@pytest.mark.parametrize("name, family", [("BertModel", "bert"), ("RobertaModel", "roberta")])
def test_flattened_inputs(name, family, saved, flash_attention):
    """[1, T] ids with cu_seq_lens_q; stock sdpa attends across the texts, so the padded call is the stock one."""
    packed = fastbert.accelerate(SentenceTransformer(saved(name, family), device="cpu"))
    features = packed.preprocess(TEXTS)
    assert features["input_ids"].shape[0] == 1 and {"cu_seq_lens_q", "max_length_q", "seq_idx"} <= set(features)
    expected = fastbert.restore(copy.deepcopy(packed))
    expected[0].unpad_inputs = False
    assert_same(encode(), expected, packed)
    assert calls(packed) == {"": 2}


def sentence(draw, first):
    """2 to 12 of the eight words that follow w`first`."""
    return " ".join(f"w{first + draw.randrange(8)}" for _ in range(draw.randint(2, 12)))


def fit(model):
    """A few steps of contrastive training on one batch of eight pairs, each of its own eight words → losses."""
    draw = random.Random(0)
    anchors, positives = ([sentence(draw, first) for first in range(5, 69, 8)] for _ in "ab")
    arguments = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(), max_steps=8, per_device_train_batch_size=8, optim="sgd", learning_rate=0.05,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"anchor": anchors, "positive": positives})
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_short_fit(saved):
    expected, model = both(SentenceTransformer, saved("BertModel", "bert", **NO_DROPOUT))
    before = encode()(model)
    assert_trains_alike(fit, expected, model)
    assert not torch.allclose(encode()(model), before, atol=1e-2)
    assert_same(encode(), fastbert.restore(copy.deepcopy(model)), model)  # no copy of a weight is stale


def test_a_cached_loss_sees_the_same_dropout_twice(saved):
    """It runs each batch without gradients, then again with them and with the generator's state of the first time."""
    model = fastbert.accelerate(SentenceTransformer(saved("BertModel", "bert"), device="cpu")).train()
    texts = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
    found = []
    for loss in (MultipleNegativesRankingLoss(model), CachedMultipleNegativesRankingLoss(model, mini_batch_size=8)):
        torch.manual_seed(0)
        model.zero_grad()
        loss([dict(features) for features in texts], None).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert calls(model) == {"": 6}


def test_cross_encoder_matches_answers(saved):
    expected, model = both(CrossEncoder, saved("BertForSequenceClassification", "bert", num_labels=1))
    question = "w10 w11 w12"
    pairs = [(question, answer) for answer in ("w13", "w14 " * 30, "w15 w16", "nonsense")]
    logits = torch.nn.Identity()
    assert_same(lambda m: m.predict(pairs, activation_fn=logits, convert_to_tensor=True), expected, model)
    ours, stock = (m.rank(question, [answer for _, answer in pairs]) for m in (model, expected))
    assert [hit["corpus_id"] for hit in ours] == [hit["corpus_id"] for hit in stock]
    assert set(calls(model)) == {""}
