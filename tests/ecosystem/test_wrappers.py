"""Models inside other modules, and users' hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbert
from tests.ecosystem.common import NO_DROPOUT, assert_same, assert_trains_alike, calls
from tests.models.small import batch, pair, reasons, stock

HEAD = ("BertForTokenClassification", "bert")


@torch.no_grad()
def rows(model):
    """The logits of real tokens."""
    inputs = batch("bert")
    return model(**inputs).logits[inputs["attention_mask"] == 1]


def train(model):
    """The loop that everyone writes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs, losses = batch("bert"), []
    labels = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def process_group(tmp_path):
    """This process alone, over gloo."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["wrapped first", "accelerated first"])
def test_ddp(order, process_group):
    bare = stock(*HEAD, **NO_DROPOUT)
    expected, model = DistributedDataParallel(copy.deepcopy(bare)), copy.deepcopy(bare)
    if order == "wrapped first":
        model = fastbert.accelerate(DistributedDataParallel(model))
    else:
        model = DistributedDataParallel(fastbert.accelerate(model))
    assert [base.name for base in fastbert.explain(model).models] == ["module.bert"]
    assert_trains_alike(train, expected, model)
    assert_same(rows, expected.module.eval(), model.eval())
    assert calls(model) == {"": 7}


class TwoTowers(nn.Module):
    """A user's module that holds two base models, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.question = stock("BertModel", "bert")
        self.answers = nn.ModuleList([stock("RobertaModel", "roberta")])

    def forward(self, question, answer):
        return torch.cat([self.question(**question)[1], self.answers[0](**answer)[1]])


@torch.no_grad()
def test_a_users_module():
    expected = TwoTowers()
    model = fastbert.accelerate(copy.deepcopy(expected))
    assert_same(lambda m: m(batch("bert"), batch("roberta", (3, 20))), expected, model)
    assert [(base.name, base.calls) for base in fastbert.explain(model).models] == [
        ("question", {"": 1}),
        ("answers.0", {"": 1}),
    ]


@torch.no_grad()
def test_sequential_and_data_parallel():
    inputs = batch("bert", (20,))
    for wrap in (nn.Sequential, nn.DataParallel):
        expected, model = wrap(stock("BertModel", "bert")), wrap(stock("BertModel", "bert"))
        fastbert.accelerate(model)
        assert_same(lambda m: m(inputs["input_ids"]).last_hidden_state, expected, model)
        assert calls(model) == {"": 1}


def flipped(module, args, output):
    """A user's hook that changes what a module gives."""
    return (output[0].flip(-1), *output[1:]) if isinstance(output, tuple) else output.flip(-1)


HOOKED = ["encoder.layer.0", "encoder.layer.1.attention.self.value", "embeddings", "encoder.layer.0.output.LayerNorm"]


@pytest.mark.parametrize("place", HOOKED)
@torch.no_grad()
def test_a_users_hook_inside(place):
    def run(model):
        inputs = batch("bert")
        return model(**inputs).last_hidden_state[inputs["attention_mask"] == 1]

    expected, model = pair("BertModel", "bert")
    before = run(model)
    seen = []
    for m in (expected, model):
        m.get_submodule(place).register_forward_hook(flipped)
    watch = model.get_submodule(place).register_forward_hook(lambda module, args, output: seen.append(module))
    assert_same(run, expected, model)
    assert len(seen) == 1 and not torch.allclose(run(model), before, atol=0.1)
    watch.remove()
    assert reasons(model) == ["", f"a hook is set on {place}"]
    model.get_submodule(place)._forward_hooks.clear()
    assert torch.equal(run(model), before)


@torch.no_grad()
def test_a_users_hook_outside():
    """On the base model itself, as feature extractors set them: it sees what the fast path gave."""
    _, model = pair("BertModel", "bert")
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    given = model(**batch("bert")).last_hidden_state
    assert seen[0] is given and reasons(model) == [""]
