"""Gradients of every parameter against HuggingFace by the parity rule: family × head × dtype, dropout 0."""

import pytest
import torch
import transformers

import fastbert
from fastbert.models.families import CAUSAL_HEADS
from fastbert.parity import enliven
from fastbert.parity_models import ragged_batch
from tests.models.gradients import compare, labels_of
from tests.models.small import BASES, HEADS, VOCABULARY, batch, head_batch, stock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**12  # of the loss in fp16, whose gradients would vanish
BATCHES = 8
RAGGED = (33, 1, 16, 7)
DENSE = (17,) * 2  # for the heads whose loss reads pad rows: there HuggingFace's own path runs
# `make test` takes every head of BERT in fp32, and of each family one head in all dtypes.
CASES = [
    pytest.param(family, head, dtype, id=f"{head}-{dtype}", marks=[] if lean else pytest.mark.slow)
    for family, head in HEADS
    for dtype in DTYPES
    for lean in [head.endswith("ForMaskedLM") or (family == "bert" and dtype == "fp32")]
]


def batch_of(family, head, seed):
    """A batch with labels on which the fast path runs."""
    dense = head.endswith((*CAUSAL_HEADS, "ForQuestionAnswering"))
    inputs = head_batch(head, family, DENSE if dense else RAGGED)
    if head.endswith("ForMultipleChoice"):
        inputs = {name: x.view(-1, 2, x.shape[2]) for name, x in inputs.items()}
    inputs["input_ids"] = other_ids(inputs, seed)
    return {**inputs, **labels_of(head, inputs, VOCABULARY, seed)}


def other_ids(inputs, seed):
    """Random ids where the batch has tokens."""
    ids, generator = inputs["input_ids"], torch.Generator().manual_seed(seed)
    return torch.where(inputs["attention_mask"] == 1, torch.randint(5, VOCABULARY, ids.shape, generator=generator), ids)


def assert_gradients(found, model, parity, check, dtype):
    """Every verdict passed, and every forward of the accelerated model was fast."""
    assert fastbert.explain(model).models[0].calls.keys() == {""}
    for name, verdict in found.items():
        parity.keep(f"gradients/{check}/{name}", dtype, verdict)
    assert [f"{name}: {verdict}" for name, verdict in found.items() if not verdict.passed] == []


@pytest.mark.parametrize(("family", "head", "dtype"), CASES)
def test_every_head(family, head, dtype, parity):
    def loss_on(inputs):
        return lambda model: model(**inputs).loss

    losses = [loss_on(batch_of(family, head, seed)) for seed in range(BATCHES)]
    scale = SCALE if dtype == "fp16" else 1.0
    assert_gradients(*compare(stock(head, family), DTYPES[dtype], losses, scale), parity, head, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "name"), BASES)
def test_every_base_model(family, name, dtype, parity):
    """Gradients into every real row of every hidden state and into the pooled output, none into padding."""
    inputs = batch(family, RAGGED)
    real = inputs["attention_mask"] == 1

    def loss_on(seed):
        upstream = torch.randn(int(real.sum()), 64, generator=torch.Generator().manual_seed(seed))
        ids = other_ids(inputs, seed)

        def loss(model):
            out = model(**{**inputs, "input_ids": ids}, output_hidden_states=True)
            outputs = [x[real] for x in out.hidden_states[1:]]
            outputs += [out.pooler_output] if out.get("pooler_output") is not None else []
            return sum((x * upstream[: len(x)].to(x.dtype)).mean() for x in outputs)

        return loss

    scale, losses = SCALE if dtype == "fp16" else 1.0, [loss_on(seed) for seed in range(BATCHES)]
    assert_gradients(*compare(stock(name, family), DTYPES[dtype], losses, scale), parity, name, dtype)


@pytest.mark.parametrize(("family", "name"), [("bert", "BertModel"), ("roberta", "RobertaModel")])
def test_padding_rows_of_the_tables_get_no_gradient(family, name, parity):
    """Pad ids without a mask are attended; their row of words, and RoBERTa's of positions, still gets no gradient."""
    model = stock(name, family)
    pad, ids = model.config.pad_token_id, batch(family, (16,) * 4)["input_ids"]
    ids[:, 5:9] = pad

    def loss_on(seed):
        upstream = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(seed))
        return lambda m: (lambda hidden: (hidden * upstream.to(hidden.dtype)).mean())(m(ids).last_hidden_state)

    found, ours = compare(model, torch.float32, [loss_on(seed) for seed in range(BATCHES)])
    assert_gradients(found, ours, parity, f"{name}, pad ids", "fp32")
    tables = [ours.embeddings.word_embeddings] + [ours.embeddings.position_embeddings] * (family == "roberta")
    for table in tables:
        assert not table.weight.grad[pad].any() and table.weight.grad[pad + 3 :].any()


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_layers_of_real_size(dtype, parity):
    """Two layers of bert-base with its vocabulary, sequences from 1 to 64 tokens."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=2)).eval()
    enliven(model)

    inputs = ragged_batch(model, (64, 1, 33, 16))
    labels = inputs["input_ids"].roll(1, 1).masked_fill(inputs["attention_mask"] == 0, -100)
    found, ours = compare(model, DTYPES[dtype], [lambda m: m(**inputs, labels=labels).loss])
    assert_gradients(found, ours, parity, "bert-base, 2 layers", dtype)
