"""A model that is copied, cast, pickled, saved, sent to another process, shared by threads."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

import fastbert
from tests.ecosystem.common import assert_same, calls, logits_and_calls
from tests.ecosystem.test_pipelines import TEXTS
from tests.models.small import batch, pair

HEADS = [
    ("BertForMaskedLM", "bert"),
    ("RobertaForSequenceClassification", "roberta"),
    ("DistilBertForTokenClassification", "distilbert"),
]


@torch.no_grad()
def first_rows(model):
    """The logits, or the hidden states, of the first token of each text; or the logits of each text."""
    rows = model(**batch(model.config.model_type), return_dict=False)[0]
    return rows[:, 0] if rows.dim() == 3 else rows


def saved_whole(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def saved_weights(model, folder):
    torch.save(model.state_dict(), folder / "weights.pt")
    other = type(model)(model.config).eval()  # the head's class, which is the stock one
    other.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return fastbert.accelerate(other)


COPIES = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "state_dict": saved_weights,
}


@pytest.mark.parametrize("name, family", HEADS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy(how, name, family, tmp_path):
    expected, model = pair(name, family)
    first_rows(model)
    other = COPIES[how](model, tmp_path)
    assert_same(first_rows, expected, other)
    assert calls(other) == {"": 1}
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert_same(first_rows, expected, model)  # nothing is shared


CASTS = {
    "half": lambda model: model.half(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.bfloat16).float(),
    "to cpu": lambda model: model.to("cpu"),
}


@pytest.mark.parametrize("name, family", HEADS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast(cast, name, family):
    expected, model = pair(name, family)
    first_rows(model)
    expected, model = CASTS[cast](expected), CASTS[cast](model)
    assert_same(first_rows, expected, model)
    assert set(calls(model)) == {""}


@pytest.mark.parametrize("name, family", HEADS)
def test_float64(name, family):
    expected, model = pair(name, family)
    first_rows(model)
    torch.testing.assert_close(first_rows(model.double()), first_rows(expected.double()), rtol=1e-12, atol=1e-12)
    assert calls(model) == {"": 2}


@pytest.mark.parametrize("name, family", [*HEADS, ("BertModel", "bert"), ("RobertaModel", "roberta")])
def test_what_is_saved_is_a_stock_checkpoint(name, family, tmp_path):
    expected, model = pair(name, family)
    first_rows(model)
    expected.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "fast")
    configs = [(tmp_path / kind / "config.json").read_text() for kind in ("stock", "fast")]
    assert configs[0] == configs[1]
    tensors = [load_file(tmp_path / kind / "model.safetensors") for kind in ("stock", "fast")]
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "fast")
    assert type(loaded).__module__.startswith("transformers.") and torch.equal(first_rows(loaded), first_rows(expected))


def test_a_moving_average():
    """AveragedModel copies the model, then edits the weights of the copy in place."""
    expected, model = pair("BertForMaskedLM", "bert")
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (expected, model)]
    for m, average in zip((expected, model), averages, strict=True):
        first_rows(average.module)
        for factor in (1.1, 1.2):
            with torch.no_grad():
                m.bert.encoder.layer[0].output.dense.weight.mul_(factor)
            average.update_parameters(m)
    assert_same(lambda average: first_rows(average.module), *averages)
    assert calls(averages[1]) == {"": 2}


def test_pickled_to_a_worker_process():
    _, model = pair("BertForMaskedLM", "bert")
    inputs = batch("bert")
    with torch.no_grad():
        here = model(**inputs).logits
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there, how = pool.apply(logits_and_calls, (model, inputs))
    assert torch.equal(there, here) and how == {"": 1}


@pytest.mark.slow
def test_sentence_transformers_in_two_processes(saved):
    model = fastbert.accelerate(SentenceTransformer(saved("BertModel", "bert"), device="cpu"))
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        there = model.encode(TEXTS * 4, pool=pool, batch_size=5, chunk_size=10, convert_to_tensor=True)
    finally:
        model.stop_multi_process_pool(pool)
    assert torch.equal(there, model.encode(TEXTS * 4, batch_size=5, convert_to_tensor=True))


def test_threads_encode_at_the_same_time(saved):
    model = fastbert.accelerate(SentenceTransformer(saved("BertModel", "bert"), device="cpu"))
    batches = [[*TEXTS[i % 5 :], f"w{5 + i}"] for i in range(24)]
    alone = [fastbert.accelerate(copy.deepcopy(model)).encode(texts, convert_to_tensor=True) for texts in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda texts: model.encode(texts, convert_to_tensor=True), batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert set(calls(model)) == {""}
