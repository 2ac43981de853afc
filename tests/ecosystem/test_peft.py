"""LoRA by PEFT: fast while its layers are in place, merged in place, trained, and gone; other adapters run as stock."""

import copy

import peft
import pytest
import torch

import fastbert
from tests.ecosystem.common import NO_DROPOUT, assert_same, assert_trains_alike, calls, gradients
from tests.models.small import batch, stock

pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # its next name

HEAD = ("BertForTokenClassification", "bert")


def lora(**changes):
    """Adapters that do something from the start: init_lora_weights=False."""
    targets = ["query", "value", "dense"]
    return peft.LoraConfig(task_type="TOKEN_CLS", target_modules=targets, r=4, init_lora_weights=False, **changes)


def with_lora(model, **changes):
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora(**changes))


@torch.no_grad()
def logits(model):
    """The logits of real tokens."""
    inputs = batch("bert")
    return model(**inputs).logits[inputs["attention_mask"] == 1]


@pytest.fixture(params=["before", "after"])
def pair(request):
    """A stock model with LoRA, and one that was accelerated before or after it got its adapters."""
    expected = with_lora(stock(*HEAD, **NO_DROPOUT)).eval()
    if request.param == "after":
        return expected, fastbert.accelerate(copy.deepcopy(expected))
    model = fastbert.accelerate(stock(*HEAD, **NO_DROPOUT))
    logits(model)  # packed copies of the weights are there when PEFT edits weight.data
    return expected, with_lora(model).eval()


def last_reason(model):
    """Why the next forward takes the stock path; "" is fast."""
    before = calls(model)
    logits(model)
    (reason,) = calls(model) - before
    return reason


def test_adapters_in_place(pair):
    expected, model = pair
    base = logits(stock(*HEAD, **NO_DROPOUT))
    assert not torch.allclose(logits(expected), base, atol=0.1)
    assert_same(logits, expected, model)
    assert last_reason(model) == ""
    with expected.disable_adapter(), model.disable_adapter():
        assert_same(logits, expected, model)
        torch.testing.assert_close(logits(model), base)


def test_adapters_merged_in_place_and_unmerged(pair):
    expected, model = pair
    before = logits(model)
    for m in pair:
        m.merge_adapter()
    assert_same(logits, expected, model)
    assert last_reason(model) == ""
    for m in pair:
        m.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_adapters_gone(how, pair):
    expected, model = (getattr(m, how)() for m in pair)
    assert_same(logits, expected, model)
    assert last_reason(model) == ""
    if how == "unload":
        assert_same(logits, stock(*HEAD, **NO_DROPOUT), model)


def test_adapters_train(pair, tmp_path):
    def train(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        inputs, losses = batch("bert"), []
        labels = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
        for _ in range(8):
            loss = model.train()(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected, model = pair
    assert_trains_alike(train, expected, model)
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(stock(*HEAD, **NO_DROPOUT), str(tmp_path)).eval()
    assert_same(logits, loaded, model)
    assert_same(logits, loaded.merge_and_unload(), model.merge_and_unload())
    assert last_reason(model.base_model.model) == ""


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_train_under_gradient_checkpointing(reentrant, pair):
    def step(model):
        inputs = batch("bert")
        model.train()(**inputs).logits[inputs["attention_mask"] == 1].square().mean().backward()
        return gradients(model)

    for m in pair:
        m.enable_input_require_grads()  # a hook on the embeddings that reentrant checkpoints need
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(step, *pair)
    assert last_reason(pair[1]) == ""


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}, {"layers_to_transform": [1]}], ids=str)
def test_kinds_of_lora(changes):
    expected = with_lora(stock(*HEAD), **changes).eval()
    model = fastbert.accelerate(copy.deepcopy(expected))
    assert_same(logits, expected, model)
    assert last_reason(model) == ""


def test_each_text_its_own_adapter():
    """PEFT hands the names to its layers by hooks, and these split the batch by rows."""
    expected = with_lora(stock(*HEAD)).eval()
    expected.add_adapter("other", lora())
    model = fastbert.accelerate(copy.deepcopy(expected))
    names = ["default", "other", "__base__", "other"]

    @torch.no_grad()
    def run(m):
        return m(**batch("bert"), adapter_names=names).logits[batch("bert")["attention_mask"] == 1]

    assert_same(run, expected, model)
    assert_same(logits, expected, model)
    assert len(calls(model)) == 2 and calls(model)[""] == 1


def test_a_hook_on_an_adapter():
    expected = with_lora(stock(*HEAD)).eval()
    model = fastbert.accelerate(copy.deepcopy(expected))
    shapes = []
    for m in (expected, model):
        query = m.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        query.lora_A["default"].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        logits(m)
    assert shapes == [(4, 33, 4)] * 2


def test_ia3_runs_as_stock():
    config = peft.IA3Config(
        task_type="TOKEN_CLS", target_modules=["key"], feedforward_modules=[], init_ia3_weights=False
    )
    expected = peft.get_peft_model(stock(*HEAD), config).eval()
    model = fastbert.accelerate(copy.deepcopy(expected))
    assert_same(logits, expected, model)
    assert "self.key is peft.tuners.ia3.layer.Linear, not torch.nn.Linear" in last_reason(model)
    model = model.merge_and_unload()
    assert_same(logits, expected, model)
    assert last_reason(model) == ""
