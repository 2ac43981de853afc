"""Gradient checkpointing: the same gradients, dropout included, from less memory."""

import copy

import pytest
import torch

import fastbert
from tests.ecosystem.common import NO_DROPOUT, assert_same, calls, gradients
from tests.models.small import batch, stock

HEADS = [
    ("BertForTokenClassification", "bert"),
    ("RobertaForSequenceClassification", "roberta"),
    ("DistilBertForMaskedLM", "distilbert"),
]
DISTILBERT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # its next name
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


def step(model):
    """The gradients of one training step; of real tokens only where the head has logits of each."""
    torch.manual_seed(3)
    inputs = batch(model.config.model_type)
    model.zero_grad()
    logits = model.train()(**inputs).logits
    real = logits[inputs["attention_mask"] == 1] if logits.dim() == 3 else logits
    real.square().mean().backward()
    return gradients(model)


def kept(model):
    """How many values a forward keeps for its backward."""
    sizes = []

    def pack(tensor):
        sizes.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**batch(model.config.model_type))
    return sum(sizes)


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@REENTRANT
@pytest.mark.parametrize("name, family", HEADS)
def test_gradients_of_stock(name, family, reentrant):
    changes = DISTILBERT if family == "distilbert" else NO_DROPOUT
    expected = stock(name, family, **changes)
    model = checkpointed(fastbert.accelerate(copy.deepcopy(expected)), reentrant)
    assert_same(step, expected, model)
    assert set(calls(model)) == {""}


@REENTRANT
@pytest.mark.parametrize("name, family", HEADS)
def test_dropout_is_the_same_when_recomputed(name, family, reentrant):
    model = fastbert.accelerate(stock(name, family))
    plain, memory = step(model), kept(model)
    assert torch.equal(step(model), plain)
    other = checkpointed(fastbert.accelerate(stock(name, family)), reentrant)
    assert torch.equal(step(other), plain)
    assert kept(other) < memory / 2
    other.gradient_checkpointing_disable()
    assert torch.equal(step(other), plain) and kept(other) == memory
