"""HuggingFace's Trainer and Accelerate."""

import copy

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import fastbert
from tests.ecosystem.common import NO_DROPOUT, assert_same, assert_trains_alike, calls, weights
from tests.models.small import LABELS, batch, pair, stock

HEAD = ("BertForTokenClassification", "bert")


def dataset(rows=32):
    """Ragged texts; a token's label is the remainder of its id."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 11, (2 + 5 * i % 29,), generator=draw) for i in range(rows)]
    return [{"input_ids": ids.tolist(), "labels": (ids % LABELS).tolist()} for ids in texts]


def trainer_of(model, folder, tokenizer, optimizer=None, **changes):
    options = {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", **changes}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.Trainer(
        model, arguments, collator, dataset(), dataset(), optimizers=(optimizer, None), processing_class=tokenizer
    )


@torch.no_grad()
def logits(model):
    """The logits of real tokens."""
    inputs = batch(model.config.model_type)
    return model(**inputs).logits[inputs["attention_mask"] == 1]


@torch.no_grad()
def hidden(model):
    """The last hidden states of real tokens."""
    inputs = batch(model.config.model_type)
    return model(**inputs).last_hidden_state[inputs["attention_mask"] == 1]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # its next name
@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer_with_an_optimizer_made_before_accelerate(changes, tmp_path, tokenizer):
    """Evaluation between the steps is fast, and sees the weights as they are then."""
    seen = {}

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if model is fast:
            fastbert.accelerate(model)
        trainer = trainer_of(model, tmp_path, tokenizer, optimizer, eval_strategy="steps", eval_steps=2, **changes)
        trainer.train()
        seen[model] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return losses(trainer)

    expected = stock(*HEAD, **NO_DROPOUT)
    fast = copy.deepcopy(expected)
    assert_trains_alike(train, expected, fast)
    near = pytest.approx(seen[expected], rel=1e-3 if "bf16" in changes else 1e-5)  # they differ by a third and more
    assert len(set(seen[fast])) == 4 and seen[fast] == near
    assert calls(fast) == {"": 24}


@pytest.mark.parametrize("name, family", [HEAD, ("DistilBertForTokenClassification", "distilbert")])
def test_a_resumed_run_is_the_uninterrupted_run(name, family, tmp_path, tokenizer):
    """With dropout and AdamW, from a checkpoint in the middle, bitwise."""
    whole = fastbert.accelerate(stock(name, family))
    trainer_of(whole, tmp_path, tokenizer, save_strategy="steps", save_steps=4).train()
    resumed = fastbert.accelerate(stock(name, family))
    trainer = trainer_of(resumed, tmp_path / "other", tokenizer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8 and calls(resumed) == {"": 4}
    assert torch.equal(weights(resumed), weights(whole))
    saved = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert type(saved) is getattr(transformers, name) and torch.equal(weights(saved), weights(whole))
    assert_same(logits, saved.eval(), whole.eval())


def test_trainer_evaluates_and_predicts(tmp_path, tokenizer):
    expected, model = pair(*HEAD)

    def predict(model):
        answer = trainer_of(model, tmp_path, tokenizer).predict(dataset())
        real = torch.from_numpy(answer.predictions[answer.label_ids != -100])
        return torch.cat([real.flatten(), torch.tensor([answer.metrics["test_loss"]])])

    assert_same(predict, expected, model)
    assert calls(model) == {"": 4}


@pytest.fixture
def accelerator(request):
    """An Accelerator of the test's precision; it keeps its settings in the process, and the Trainer's too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate(order, accelerator, tmp_path, tokenizer):
    """The loop of the library's documentation, with fastbert before or after `prepare`."""

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        collator = transformers.DataCollatorForTokenClassification(tokenizer)
        loader = DataLoader(dataset(), batch_size=8, collate_fn=collator)
        if model is fast and order == "before":
            fastbert.accelerate(model)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if model is fast and order == "after":
            fastbert.accelerate(prepared)
        prepared.train()
        losses = []
        for rows in loader:
            loss = prepared(**rows).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert accelerator.unwrap_model(prepared) is model
        return losses

    expected = stock(*HEAD, **NO_DROPOUT)
    fast = copy.deepcopy(expected)
    assert_trains_alike(train, expected, fast)
    accelerator.save_model(fast, tmp_path)
    expected.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(logits, expected.eval(), fast.eval())


@pytest.mark.parametrize("accelerator", ["bf16"], indirect=True)
def test_a_bare_base_model_whose_forward_accelerate_wraps(accelerator):
    expected, model = (accelerator.prepare(m) for m in pair("BertModel", "bert"))
    assert "forward" in model.__dict__
    assert_same(hidden, expected, model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_same(hidden, stock("BertModel", "bert"), model)
    assert calls(model) == {"": 2}
