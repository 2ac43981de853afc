"""Losses on padded batches: a head that reads rows of padding gets HuggingFace's, whatever the labels there are."""

import copy
import threading

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.models.heads import TOKEN_HEADS, pad_rows_reason
from tests.models.small import HEADS, batch, head_batch, pair, reasons, stock

LABELLED_PADS = "labels other than -100 stand at masked positions, where the loss reads pad rows"
CAUSAL = "labels were given to a causal head, whose loss may read pad rows"
TOKEN_PAIRS = [entry for entry in HEADS if entry[1] in TOKEN_HEADS]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def labels_of(inputs, on_pads):
    labels = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"]) % 3
    return labels if on_pads else labels.masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize(("family", "name"), TOKEN_PAIRS)
def test_labels_on_padding_give_the_loss_of_huggingface(family, name):
    """The head sees its labels: on padding, HuggingFace's own path runs for that one call."""
    expected, model = pair(name, family)
    imported = getattr(fastbert, name)(expected.config).eval()
    imported.load_state_dict(expected.state_dict())
    inputs = batch(family)
    more = {"next_sentence_label": torch.tensor([0, 1, 1, 0])} if "PreTraining" in name else {}
    for ours in (model, imported, copy.deepcopy(model)):
        for on_pads in (False, True):
            call = dict(inputs, labels=labels_of(inputs, on_pads), **more)
            torch.testing.assert_close(ours(**call).loss, expected(**call).loss, **CLOSE)
        ours(**inputs)
        causal = "CausalLM" in name or "LMHead" in name
        assert set(reasons(ours)) == ({CAUSAL, ""} if causal else {LABELLED_PADS, ""})
    assert type(fastbert.restore(model)) is type(expected)


@pytest.mark.parametrize("mask", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_any_dtype_and_positional_arguments(mask):
    expected, model = pair("BertForTokenClassification", "bert")
    inputs = batch("bert")
    inputs["attention_mask"] = inputs["attention_mask"].to(mask) * (1 if mask == torch.bool else 0.5)
    labels = labels_of(inputs, on_pads=True)
    args = (*inputs.values(), None, None, labels)
    torch.testing.assert_close(model(*args).loss, expected(*args).loss, **CLOSE)
    assert reasons(model) == [LABELLED_PADS]


def test_the_choice_ends_with_the_call_and_stays_in_its_thread():
    _, model = pair("BertForTokenClassification", "bert")
    inputs = batch("bert")
    with pytest.raises(IndexError):  # a label past the last, on padding: the loss raises after the base model ran
        model(**inputs, labels=torch.full_like(inputs["input_ids"], 7))
    assert reasons(model) == [LABELLED_PADS]
    model.bert(**inputs)  # without the head, which would choose anew
    assert reasons(model)[-1] == ""
    inside, done = threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        done.wait(10)

    model.classifier.register_forward_pre_hook(wait)
    labels = labels_of(inputs, on_pads=True)
    thread = threading.Thread(target=lambda: model(**inputs, labels=labels))
    thread.start()
    inside.wait(10)
    model.bert(**inputs)  # while the other thread's head has asked for exact rows
    done.set()
    thread.join()
    assert fastbert.explain(model).models[0].calls[""] == 2


def test_no_label_is_read_on_a_gpu():
    """Values on another device than the CPU are never looked at: on `meta` there are none."""
    zeros = torch.zeros(2, 3)
    assert pad_rows_reason("BertForTokenClassification", zeros, zeros) == LABELLED_PADS
    for labels, mask in [(zeros.to("meta"), zeros), (zeros, zeros.to("meta")), (zeros.to("meta"), zeros.to("meta"))]:
        assert pad_rows_reason("BertForTokenClassification", labels, mask) == ""


def test_the_discriminator_of_electra_leaves_padding_out_by_itself():
    expected, model = pair("ElectraForPreTraining", "electra")
    inputs = batch("electra")
    call = dict(inputs, labels=labels_of(inputs, on_pads=True).clamp(max=1))
    torch.testing.assert_close(model(**call).loss, expected(**call).loss, **CLOSE)
    assert reasons(model) == [""]


@pytest.mark.parametrize(("family", "name"), [entry for entry in HEADS if "QuestionAnswering" in entry[1]])
def test_question_answering_reads_all_positions(family, name):
    expected, model = pair(name, family)
    inputs = batch(family)
    spans = {"start_positions": torch.tensor([3, 0, 5, 2]), "end_positions": torch.tensor([4, 0, 9, 60])}
    a, b = expected(**inputs, **spans), model(**inputs, **spans)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.start_logits, b.start_logits)
    assert reasons(model) == ['pad_output="exact" and the batch has padding']
    fastbert.accelerate(model, pad_output="zeros")(**inputs, **spans)
    assert reasons(model)[-1] == ""


@pytest.mark.parametrize("summary", ["first", "last", "mean"])
def test_the_summaries_of_electra(summary):
    """All but "first" read pad rows."""
    expected, model = pair("ElectraForMultipleChoice", "electra", summary_type=summary)
    call = dict(head_batch("ElectraForMultipleChoice", "electra"), labels=torch.tensor([2]))
    a, b = expected(**call), model(**call)
    torch.testing.assert_close(b.logits, a.logits, **CLOSE)
    torch.testing.assert_close(b.loss, a.loss, **CLOSE)
    exact = 'pad_output="exact" and the batch has padding'
    assert reasons(model) == ["" if summary == "first" else exact]


class Tagger(nn.Module):
    """A user's module around two heads."""

    def __init__(self):
        super().__init__()
        self.head = stock("BertForTokenClassification", "bert")
        self.other = stock("RobertaForMaskedLM", "roberta")


def test_heads_inside_other_modules_are_found():
    model = Tagger()
    fastbert.accelerate(model)
    assert type(model.head) is fastbert.BertForTokenClassification
    assert type(model.other) is fastbert.RobertaForMaskedLM
    fastbert.restore(model)
    assert type(model.head) is transformers.BertForTokenClassification
    assert type(model.other) is transformers.RobertaForMaskedLM
